"""Which base models can carry an AHN: everything that the hooks rely on, asked before anything is changed.

What is read in a class's source is read once per process: Python parses a whole modeling file for it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ahn import private
from ahn.errors import AHNError
from ahn.shape import ModelShape
from ahn.wrappers import attention_name, decoder_of

_TAKES_MASKS = "if not isinstance(causal_mask_mapping := attention_mask, dict):"
"""How a decoder asks whether it was given a mask for each kind of layer."""

_UPDATES = tuple(f"{name}.update" for name in private.CACHE_NAMES)


def decoder_layers(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise AHNError(f"{type(model).__name__} has no decoder with a list of layers (model.get_decoder().layers).")
    return decoder, layers


def attention_module(layer: nn.Module, shape: ModelShape) -> nn.Module:
    """The layer's attention, checked for everything that the hooks rely on."""
    if hasattr(layer, "shared_transformer"):
        raise AHNError(
            f"{type(layer).__name__} attends in a block that other layers share (shared_transformer), and a memory "
            "belongs to one layer."
        )
    part = attention_name(layer)
    if part is None:
        raise AHNError(f"{type(layer).__name__} has no self_attn; an AHN needs a decoder with standard attention.")
    module: nn.Module = getattr(layer, part)
    name = type(module).__name__
    fused = getattr(module, "qkv_proj", None) is not None
    needed = ("qkv_proj", "o_proj") if fused else ("q_proj", "k_proj", "v_proj", "o_proj")
    missing = [part for part in needed if getattr(module, part, None) is None]
    if missing:
        raise AHNError(
            f"{name} has no {', '.join(missing)}; latent attention and shared keys and values are not supported."
        )
    if not hasattr(module.o_proj, "in_features"):
        raise AHNError(f"{name}.o_proj is a {type(module.o_proj).__name__}, not a linear map of what the heads give.")
    if module.o_proj.in_features != shape.heads * shape.head_dim:
        raise AHNError(
            f"{name}.o_proj takes {module.o_proj.in_features} features, not {shape.heads} heads of {shape.head_dim}."
        )
    source = _source(type(module).forward, name)
    if "get_interface" not in source and "ALL_ATTENTION_FUNCTIONS" not in source:
        raise AHNError(f"{name} does not call transformers' attention interface; an AHN cannot hook into it.")
    if not _takes_keywords(type(module).forward):
        raise AHNError(f"{name}.forward takes no **kwargs, so the memory cannot receive its input.")
    _check_calls(type(module).forward, name)
    if not _hands_on_keywords(type(layer).forward, part, type(layer).__name__):
        raise AHNError(f"{type(layer).__name__}.forward gives its attention no **kwargs, which a memory needs.")
    return module


def check_decoder(decoder: nn.Module) -> None:
    """Raises AHNError unless the decoder works with a cache and keyword arguments of others."""
    kind, config = type(decoder), decoder.config
    # Embedding models are made so of causal ones (E5, EmbeddingGemma, …).
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    if both_ways or getattr(config, "is_causal", True) is False:
        raise AHNError(f"This {kind.__name__} attends in both directions; a memory holds what came before.")
    if not _takes_keywords(kind.forward):
        raise AHNError(f"{kind.__name__}.forward takes no **kwargs, so layers cannot be told what they see.")
    kinds: list[Any] = [type(part) for part in decoder.modules()]
    for part in kinds:
        _check_continues(part)
    file = sys.modules[kind.__module__]
    caches = [x for x in vars(file).values() if isinstance(x, type) and issubclass(x, Cache)]
    own = [x.__name__ for x in caches if x.__module__ == file.__name__]
    if own:
        raise AHNError(f"{kind.__name__} wants a cache of its own, {own[0]}, which has no place for a memory.")


def makes_masks(model: PreTrainedModel, decoder: nn.Module) -> nn.Module | None:
    """What is around the decoder and decides for it who sees whom, as in some models that see images.

    Raises:
        AHNError: the decoder does not take the masks that are made for it as they are.
    """
    for around in _around(model, decoder):
        name = type(around).__name__
        if "_mask_mapping" not in _source(type(around).forward, name):
            continue
        if _TAKES_MASKS not in _source(type(decoder).forward, type(decoder).__name__):
            raise AHNError(
                f"{name} makes attention masks of its own, which say nothing of a window. The text model inside can "
                "have a memory."
            )
        return around
    return None


def counts_anew(decoder: nn.Module) -> bool:
    """Whether the decoder numbers the tokens of every forward from 0 where it is given no positions (Bamba)."""
    forward = type(decoder).forward
    positions = "position_ids" in inspect.signature(forward).parameters
    return positions and "get_seq_length" not in _source(forward, type(decoder).__name__)


def makes_caches(model: PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    """What is around the decoder and makes a cache for it where none is given (Idefics3, SmolVLM)."""
    return [x for x in _around(model, decoder) if "DynamicCache(" in _source(type(x).forward, type(x).__name__)]


def _around(model: PreTrainedModel, decoder: nn.Module) -> Iterator[nn.Module]:
    """What the decoder is in, from the inside out."""
    inside = next(name for name, part in model.named_modules() if part is decoder)
    while inside:
        inside = inside.rpartition(".")[0]
        yield model.get_submodule(inside)


@functools.cache
def _check_continues(kind: type[nn.Module]) -> None:
    """A recurrent layer of the base must go on from its state when it is given several tokens: texts come in chunks."""
    if kind.__module__.startswith("transformers.models") and "forward" in vars(kind):
        source = inspect.getsource(kind)
        if ".update_recurrent_state(" in source and "initial_state" not in source:
            raise AHNError(
                f"{kind.__name__} does not go on where the last chunk of a text ended, so long ones cannot be read."
            )


@functools.cache
def _check_calls(forward: Any, name: str) -> None:
    """One call of the attention function, with the mask as it came: what comes out is the attention of this layer."""
    calls = [call for call in _calls(forward, name) if ast.unparse(call.func) == "attention_interface"]
    if len(calls) > 1:
        raise AHNError(f"{name} attends {len(calls)} times per layer; an AHN needs one attention.")
    for call in calls:
        by_name = {keyword.arg: keyword.value for keyword in call.keywords}
        mask = call.args[4] if len(call.args) > 4 else by_name.get("attention_mask")
        if mask is None or ast.unparse(mask) != "attention_mask":
            raise AHNError(f"{name} makes an attention mask of its own, which says nothing of a window.")
        if "position_bias" in by_name:
            raise AHNError(
                f"{name} gives each key a bias by its position, of which there is none for keys of a window."
            )
    for call in _calls(forward, name):
        if ast.unparse(call.func) in _UPDATES and len(call.args) > 2 and ast.unparse(call.args[2]) != "self.layer_idx":
            raise AHNError(
                f"{name} keeps keys and values in layer {ast.unparse(call.args[2])} of the cache: a text goes through "
                "it several times, through a memory once."
            )


def _takes_keywords(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


@functools.cache
def _hands_on_keywords(forward: Any, part: str, name: str) -> bool:
    """Whether `self.part` is given the caller's **kwargs wherever a module's forward calls it with more than its input.

    A part that is attention in some layers and, say, an MLP in others is given its input alone in those.
    """
    calls = [call for call in _calls(forward, name) if ast.unparse(call.func) == f"self.{part}"]
    attending = [call for call in calls if len(call.args) + len(call.keywords) > 1]
    return all(any(keyword.arg is None for keyword in call.keywords) for call in attending)


@functools.cache
def _source(function: Any, name: str) -> str:
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        raise AHNError(
            f"{name}.forward has no source to read, so it cannot be checked for what an AHN needs: define the class in "
            "a file, not in a shell."
        ) from None


def _calls(forward: Any, name: str) -> list[ast.Call]:
    tree = ast.parse(_source(forward, name))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
