"""The transformers model inside what others put around it: PEFT, DistributedDataParallel, torch.compile."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ahn.errors import AHNError, named


def unwrapped(model: Any) -> Any:
    """The outermost transformers model in `model`, which is itself where nothing is around it.

    Raises:
        AHNError: there is none.
    """
    inside = model.modules() if isinstance(model, nn.Module) else ()
    for part in inside:
        if isinstance(part, PreTrainedModel):
            return part
    raise AHNError(
        f"This takes a loaded transformers model, not {named(model)}: load one with "
        "transformers.AutoModelForCausalLM.from_pretrained or ahn.from_pretrained first."
    )


def attached(model: Any) -> Any:
    """The model in `model` that `ahn.attach` was applied to.

    Raises:
        AHNError: there is none.
    """
    inner = unwrapped(model)
    if getattr(inner, "_ahn", None) is None:
        raise AHNError("This model has no AHN; call ahn.attach(model, ahn.AHNConfig(...)) first.")
    return inner


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of layers of a transformers model, which may be the model itself.

    Where a class names a part that it does not have (`base_model_prefix` of Llama 4 and others), transformers takes
    the whole model for its decoder.
    """
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)


def attention_name(layer: nn.Module) -> str | None:
    """What a decoder layer calls its attention; None if it has none.

    In Nemotron-H it is a `mixer`, and so is what other layers have in its place.
    """
    return next((name for name in ("self_attn", "mixer") if hasattr(layer, name)), None)


def attention_of(model: PreTrainedModel, index: int) -> Any:
    """The attention of a layer of an adapted model.

    Raises:
        AHNError: layers were taken out, copied or moved since.
    """
    layers = decoder_of(model).layers
    name = attention_name(layers[index]) if index < len(layers) else None
    if name is None or getattr(getattr(layers[index], "ahn", None), "index", None) != index:
        raise AHNError(
            "The model's layers are not those that its AHN was attached to: detach it (ahn.detach) before layers are "
            "taken out, copied or moved, let model.config say what is left, and attach anew."
        )
    return getattr(layers[index], name)
