"""What transformers' Auto classes take for a checkpoint with an AHN: a configuration, and a class that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ahn.config import ARCHITECTURE, MODEL_TYPE, SAVED_BLOCK
from ahn.errors import AHNError


class AHNModelConfig(PreTrainedConfig):
    """The base model's configuration under a model type of its own, so that nobody loads it without its memory."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': the configuration, with the unused arguments if `return_unused_kwargs`."""
        from ahn.checkpoint.format import transformers_config
        from ahn.model.saving import BASE_NAME

        several = kwargs.pop("return_unused_kwargs", False)
        config = cls()
        path = str(kwargs.pop("name_or_path", ""))
        base = transformers_config(config_dict, Path(path))
        config.__dict__.update(vars(base))
        config.__dict__ |= {name: config_dict.get(name) for name in (SAVED_BLOCK, BASE_NAME)}
        config.__dict__ |= {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "_name_or_path": path}
        for internal in ("_from_auto", "_commit_hash"):
            kwargs.pop(internal, None)
        return (config, kwargs) if several else config


class AHNForCausalLM:
    """Loads a checkpoint by `ahn.from_pretrained`; what comes back is the base model's class with its memory."""

    config_class = AHNModelConfig

    @classmethod
    def from_pretrained(
        cls, name: str, *args: Any, config: Any = None, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As `AutoModelForCausalLM.from_pretrained`.

        Raises:
            AHNError: as `ahn.from_pretrained`, or an argument changes the configuration.
        """
        from ahn.checkpoint import from_pretrained

        for internal in ("_from_auto", "_commit_hash", "trust_remote_code", "_from_pipeline"):
            kwargs.pop(internal, None)  # code in a model's folder is never run, whatever is asked for
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        model = from_pretrained(name, **kwargs)
        nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, nothing | {"error_msgs": []}) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise AHNError(
            "A model with an AHN is not made from a configuration alone: load it with from_pretrained, or attach "
            "an AHN to a new base model (ahn.attach)."
        )
