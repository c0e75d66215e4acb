"""What transformers' Auto classes take for a checkpoint with an AHN: a configuration, and classes that load it."""

from pathlib import Path
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from ahn.config import ARCHITECTURE, MODEL_TYPE, SAVED_BLOCK
from ahn.errors import AHNError


class AHNModelConfig(PreTrainedConfig):
    """The base model's configuration under a model type of its own, so that nobody loads it without its memory."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers': the configuration, with the unused arguments if `return_unused_kwargs`."""
        from ahn.checkpoint.format import changed, transformers_config
        from ahn.model.saving import BASE_NAME

        several = kwargs.pop("return_unused_kwargs", False)
        path = str(kwargs.pop("name_or_path", ""))
        if kwargs.get("attn_implementation") == MODEL_TYPE:  # of the configuration of an adapted model
            del kwargs["attn_implementation"]
        base, kwargs = changed(transformers_config(config_dict, Path(path)), kwargs)
        config = cls()
        config.__dict__.update(vars(base))
        config.__dict__ |= {name: config_dict.get(name) for name in (SAVED_BLOCK, BASE_NAME)}
        config.__dict__ |= {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "_name_or_path": path}
        return (config, kwargs) if several else config

    def of_base(self) -> PreTrainedConfig:
        """The base model's own configuration, with whatever was changed in this one."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from ahn.model.saving import BASE_NAME, TYPED

        block = getattr(self, SAVED_BLOCK)
        kind = CONFIG_MAPPING[block.get("base_model_type", block.get("model_type"))]
        base: PreTrainedConfig = object.__new__(kind)
        vars(base).update({name: x for name, x in vars(self).items() if name not in (SAVED_BLOCK, BASE_NAME, *TYPED)})
        base.architectures = block.get("base_architectures", block.get("architectures"))
        return base


class AHNModel:
    """Loads a checkpoint as `ahn.from_pretrained`; what comes back is a class of the base with its memory."""

    config_class = AHNModelConfig
    auto_class: ClassVar[str] = "AutoModel"
    """The Auto class that finds the base's class."""

    @classmethod
    def from_pretrained(
        cls, name: str, *args: Any, config: Any = None, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As that of the Auto class.

        Raises:
            AHNError: as `ahn.from_pretrained`.
        """
        import transformers

        from ahn.checkpoint.loading import load

        for internal in ("_from_auto", "_commit_hash", "trust_remote_code", "_from_pipeline"):
            kwargs.pop(internal, None)  # code in a model's folder is never run, whatever is asked for
        lora = kwargs.pop("adapter_kwargs", None) or {}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        of_base = config.of_base() if isinstance(config, AHNModelConfig) else config
        model = load(name, auto=getattr(transformers, cls.auto_class), config=of_base, **kwargs)
        if "_adapter_model_path" in lora:  # of PEFT, which names this checkpoint as its base
            model.load_adapter(lora.pop("_adapter_model_path"), adapter_kwargs=lora)
        nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, nothing | {"error_msgs": []}) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise AHNError(
            "A model with an AHN is not made from a configuration alone: load it with from_pretrained, or attach "
            "an AHN to a new base model (ahn.attach)."
        )


class AHNForCausalLM(AHNModel):
    """With logits per token."""

    auto_class = "AutoModelForCausalLM"


class AHNForSequenceClassification(AHNModel):
    """With a class per text."""

    auto_class = "AutoModelForSequenceClassification"


class AHNForTokenClassification(AHNModel):
    """With a class per token."""

    auto_class = "AutoModelForTokenClassification"


class AHNForQuestionAnswering(AHNModel):
    """With the place of an answer."""

    auto_class = "AutoModelForQuestionAnswering"


class AHNForImageTextToText(AHNModel):
    """With logits per token, of text and images."""

    auto_class = "AutoModelForImageTextToText"


LOADERS = (
    AHNModel,
    AHNForCausalLM,
    AHNForImageTextToText,
    AHNForSequenceClassification,
    AHNForTokenClassification,
    AHNForQuestionAnswering,
)
