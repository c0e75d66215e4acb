"""What transformers' Auto classes take for a checkpoint with an AHN: a configuration, and a class that loads it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ahn.config import ARCHITECTURE, MODEL_TYPE
from ahn.errors import AHNError


class AHNModelConfig(PreTrainedConfig):
    """The base model's configuration under a model type of its own, so that nobody loads it without its memory."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': the configuration, with the unused arguments if `return_unused_kwargs`."""
        from ahn.checkpoint.format import transformers_config
        from ahn.model.saving import BASE_NAME, BLOCK

        several = kwargs.pop("return_unused_kwargs", False)
        config = cls()
        path = str(kwargs.pop("name_or_path", ""))
        base = transformers_config(config_dict, Path(path))
        config.__dict__.update(vars(base))
        config.__dict__ |= {name: config_dict.get(name) for name in (BLOCK, BASE_NAME)}
        config.__dict__ |= {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "_name_or_path": path}
        for internal in ("_from_auto", "_commit_hash"):
            kwargs.pop(internal, None)
        return (config, kwargs) if several else config


# A configuration is being loaded for whichever class belongs to it.
_for_any_class: ContextVar[bool] = ContextVar("ahn_for_any_class", default=False)


def knowing_memories(load: Callable[..., Any]) -> Callable[..., Any]:
    """`AutoConfig.from_pretrained` that also knows an AHN under its base model's type.

    Such are the published folders, and adapters from before ours had a type: transformers would make the base model of
    them, or one of random weights, and at most list the memory's as unexpected.
    """

    @functools.wraps(load)
    def from_pretrained(cls: type, name: Any, **kwargs: Any) -> Any:
        token = _for_any_class.set(True)
        try:
            found = load(cls, name, **kwargs)
        finally:
            _for_any_class.reset(token)
        config, *unused = found if isinstance(found, tuple) else (found,)
        if not isinstance(config, AHNModelConfig) and _has_memory(vars(config)):
            config = AHNModelConfig.from_dict(config.to_dict(), name_or_path=name)
        return (config, *unused) if unused else config

    return from_pretrained


def refusing_memories(make: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedConfig.from_dict` for classes of base models, which would load a base without its memory.

    So it was with `Qwen2ForCausalLM.from_pretrained(merged)`: the memory's weights were at most listed as unexpected.
    """

    @functools.wraps(make)
    def from_dict(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = cls.model_type == MODEL_TYPE or _for_any_class.get()
        # Blocks once had the base's type, and transformers takes what has it for the configuration that it looks for.
        block = {"memory", "sinks"} <= config_dict.keys()
        if not own and (block or config_dict.get("model_type") == MODEL_TYPE or _has_memory(config_dict)):
            raise AHNError(
                f"This checkpoint has an AHN, which classes of {cls.model_type} models would leave out. Load it with "
                "ahn.from_pretrained or transformers.AutoModelForCausalLM.from_pretrained."
            )
        return make(cls, config_dict, **kwargs)

    return from_dict


def saying_what_is_left_out(save: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.save_pretrained`, with a warning where the model inside has a memory: PEFT saves its own part."""

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        from ahn.model.saving import warn_of_peft
        from ahn.wrappers import unwrapped

        if hasattr(unwrapped(self), "_ahn"):
            warn_of_peft(save_directory)
        return result

    return save_pretrained


def _has_memory(fields: Mapping[str, Any]) -> bool:
    from ahn.model.saving import BLOCK, STRUCTURE

    block = fields.get(BLOCK)
    return fields.get(STRUCTURE[0]) is not None or (isinstance(block, dict) and "memory" in block)


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
