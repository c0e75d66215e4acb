"""Whether a file's tensors can be the conversation that its description says: decided before any of them is read.

Everything here is a function of the description (JSON), of the tensors' dtypes and shapes, and of the model's shape.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ahn import memory
from ahn.config import LIMIT, OF_MEMORY, AHNConfig
from ahn.errors import AHNError
from ahn.ops.quantize import code_bytes
from ahn.shape import WHOLE_TEXT, ModelShape

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPES = {dtype: name for name, dtype in FLOATS.items()} | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}
DTYPES[torch.bool] = "BOOL"
"""By what names safetensors calls them."""
OF_TOKENS = ("slots", "slot_heads", "passage", "score_layer", "key_bits", "value_bits")
"""Fields without which what a memory of tokens keeps means something else."""
_STATE = r"(conv|recurrent)_states\.\d{1,3}"
"""The name of a recurrent state."""
TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor: its dtype in safetensors' words, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_config(description: Mapping[str, Any], of_model: AHNConfig, where: str) -> tuple[AHNConfig, int]:
    """The settings of a saved conversation and the tokens that it has read.

    Args:
        description: JSON types, not to be trusted.
        of_model: settings of the model that is to go on with it; window, sinks and quantized may differ.
        where: what to call the file in a message.

    Raises:
        AHNError: a value is missing, of the wrong type, out of range or not the model's.
    """
    block, seen = description.get("config"), description.get("seen")
    known = {field.name for field in dataclasses.fields(AHNConfig)}
    if not isinstance(block, dict) or not block.keys() <= known:
        raise AHNError(f"{where} does not say with which settings it was written, or in terms unknown here.")
    try:
        config = AHNConfig.saved(block)
    except (AHNError, TypeError) as error:
        raise AHNError(f"{where} is damaged: {error}") from error
    kept = OF_TOKENS if memory.get(of_model.memory).keeps_tokens else ()
    for name in (*OF_MEMORY, *kept):
        if (there := getattr(config, name)) != (here := getattr(of_model, name)):
            raise AHNError(
                f"{where} was written with another base model or adapter: {name} {reprlib.repr(there)}, "
                f"this model has {here!r}."
            )
    sizes = {"seen": seen, "window": config.window, "sinks": config.sinks, "quantized": config.quantized}
    for name, value in sizes.items():
        if type(value) is not int or not (name == "seen") <= value < LIMIT:
            raise AHNError(f"{where} is damaged: {name} is {reprlib.repr(value)}.")
    assert isinstance(seen, int)
    return config, seen


def read_waiting(description: Mapping[str, Any], config: AHNConfig, seen: int, where: str) -> int:
    """How many of the last tokens wait beside the window.

    Raises:
        AHNError: it is not a number of tokens beyond sinks and window.
    """
    waiting = description.get("waiting", 0)
    if type(waiting) is not int or not 0 <= waiting <= max(0, seen - config.lossless):
        raise AHNError(f"{where} is damaged: waiting is {reprlib.repr(waiting)}.")
    return waiting


def check_messages(messages: Any, where: str) -> None:
    """Raises AHNError unless these are messages as chat templates take them."""
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise AHNError(f"{where} is damaged: what was said is not a list of messages.")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        return False
    return message["role"] in ("system", "user", "assistant") and isinstance(message["content"], str)


def check_layout(
    found: Mapping[str, Stored], config: AHNConfig, seen: int, waiting: int, shape: ModelShape, where: str
) -> None:
    """Compare every tensor's name, dtype and shape with what such a conversation holds.

    Args:
        waiting: so many of the tokens read wait beside the window.

    Raises:
        AHNError: a tensor is missing, too many, of another dtype or of another shape.
    """
    layers = _by_layer(found, len(shape.layer_types), where)
    with_memory = shape.memory_layers(config.full_attention_layers)
    first = layers[with_memory[0]].get("keys")
    batch = first.shape[0] if first is not None and first.shape else 0
    if not batch:
        raise AHNError(f"{where} is incomplete: layers.{with_memory[0]}.keys is missing or empty.")
    memories: dict[str, tuple[memory.Memory, dict[str, Tensor]]] = {}  # one takes milliseconds to make
    for index, tensors in enumerate(layers):
        name = f"layers.{index}"
        if index in with_memory:
            if shape.layer_types[index] == "hybrid":
                tensors = _without_states(tensors, batch, f"{where}: {name}")
            if (kind := repr(memory.of_layer(config, index))) not in memories:
                memories[kind] = _memory(config, shape, index, batch, min(seen, config.lossless + waiting))
            _check_memory_layer(tensors, config, *memories[kind], seen, waiting, batch, shape, f"{where}: {name}")
        elif tensors:
            held = seen if shape.layer_types[index] in WHOLE_TEXT else None
            _check_other_layer(tensors, seen, held, batch, f"{where}: {name}")
    _check_alike(layers, shape.layer_types, where)
    padding = {name.removeprefix("padding."): x for name, x in found.items() if name.startswith("padding.")}
    if padding:
        dtypes = {"leading": "I64", "ended": "BOOL", "moved": "I64"}
        _compare(padding, {name: Stored(dtype, (batch,)) for name, dtype in dtypes.items()}, f"{where}: padding")


def check_values(tensors: Mapping[str, Tensor], seen: int, where: str) -> None:
    """Whole numbers that become positions and sizes: -1 (none) to the tokens read.

    Raises:
        AHNError: one is out of range, or padding contradicts itself.
    """
    for name, x in tensors.items():
        if x.dtype in (torch.int64, torch.int32) and x.numel() and not -1 <= int(x.min()) <= int(x.max()) <= seen:
            raise AHNError(f"{where} is damaged: {name} holds a number outside of -1 to {seen}.")
    if "padding.leading" in tensors:
        leading, moved = tensors["padding.leading"], tensors["padding.moved"]
        if not bool(((moved >= 0) & (moved <= leading)).all()):
            raise AHNError(f"{where} is damaged: more padding was moved than there is.")


def _by_layer(found: Mapping[str, Stored], count: int, where: str) -> list[dict[str, Stored]]:
    layers: list[dict[str, Stored]] = [{} for _ in range(count)]
    for name, stored in found.items():
        part, _, rest = name.partition(".")
        number, _, own = rest.partition(".")
        if part == "layers" and number.isdecimal() and len(number) < 6 and int(number) < count and own:
            layers[int(number)][own] = stored
        elif part != "padding":
            raise AHNError(
                f"{where} holds a tensor {name[:80]!r} that does not belong to a conversation of this model."
            )
    return layers


def _check_memory_layer(
    tensors: dict[str, Stored],
    config: AHNConfig,
    fn: memory.Memory,
    gates: Mapping[str, Tensor],
    seen: int,
    waiting: int,
    batch: int,
    shape: ModelShape,
    where: str,
) -> None:
    for name in ("keys", "values"):
        if name not in tensors:
            raise AHNError(f"{where}.{name} is missing.")
    dtype = tensors["keys"].dtype
    if dtype not in FLOATS:
        raise AHNError(f"{where}.keys holds {dtype}, not numbers that attention can use.")
    held = min(seen, config.lossless + waiting)
    keys = (batch, shape.kv_heads, held, shape.head_dim)
    wanted = {"keys": Stored(dtype, keys), "values": Stored(dtype, keys)}
    wanted |= {f"gates.{name}": Stored(dtype, tuple(gate.shape)) for name, gate in gates.items()}
    state = _state(fn, config, batch, shape, dtype)
    tier = _tier(config, batch, shape, gates, dtype)
    if isinstance(fn, memory.RecurrentMemory) or state.keys() & tensors.keys():
        wanted |= state
    if seen - waiting > config.lossless or tier.keys() & tensors.keys():
        wanted |= tier
    _compare(tensors, wanted, where)


def _memory(
    config: AHNConfig, shape: ModelShape, index: int, batch: int, held: int
) -> tuple[memory.Memory, dict[str, Tensor]]:
    """A layer's memory without weights, and the write gates of the tokens in the window, without numbers."""
    with torch.device("meta"), torch.no_grad():
        fn = memory.make(config, shape, index)
        return fn, fn.write_gates(torch.empty(batch, held, shape.hidden_size))


def _state(fn: memory.Memory, config: AHNConfig, batch: int, shape: ModelShape, dtype: str) -> dict[str, Stored]:
    key = torch.empty(batch, shape.kv_heads, 0, shape.head_dim, dtype=FLOATS[dtype], device="meta")
    state = fn.init_state(batch, key.device) | fn.empty_slots(key, config.window + config.quantized)
    return {f"state.{name}": Stored(DTYPES[x.dtype], tuple(x.shape)) for name, x in state.items()}


def _tier(
    config: AHNConfig, batch: int, shape: ModelShape, gates: Mapping[str, Tensor], dtype: str
) -> dict[str, Stored]:
    if not config.quantized:
        return {}
    rows = batch, shape.kv_heads
    tier = {}
    for kind, bits in (("key", config.key_bits), ("value", config.value_bits)):
        tier[f"{kind}s"] = Stored("U8", (*rows, config.quantized, code_bytes(shape.head_dim, bits)))
        tier[f"{kind}_scales"] = Stored("BF16", (*rows, config.quantized))
        tier[f"{kind}_offset"] = Stored("F32", (*rows, shape.head_dim))
    tier |= {f"gates.{name}": Stored(dtype, (batch, x.shape[1], config.quantized)) for name, x in gates.items()}
    return {f"state.quantized.{name}": stored for name, stored in tier.items()}


def _without_states(tensors: dict[str, Stored], batch: int, where: str) -> dict[str, Stored]:
    """The tensors of a hybrid layer's attention; those of its recurrence are checked here."""
    states = {name: stored for name, stored in tensors.items() if re.fullmatch(_STATE, name)}
    if not states:
        raise AHNError(f"{where}.recurrent_states is missing.")
    _check_states(states, batch, where)
    return {name: stored for name, stored in tensors.items() if name not in states}


def _check_states(states: Mapping[str, Stored], batch: int, where: str) -> None:
    for name, stored in states.items():
        if stored.dtype not in FLOATS:
            raise AHNError(f"{where}.{name} holds {stored.dtype}, not numbers that a layer can use.")
        if not stored.shape or stored.shape[0] != batch:
            raise AHNError(f"{where}.{name} has shape {stored.shape}, the conversation has {batch} rows.")


def _check_alike(layers: Sequence[Mapping[str, Stored]], kinds: Sequence[str], where: str) -> None:
    """Recurrent states of layers of one kind have one shape, which nothing but the base's own code knows."""
    first: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}
    for index, (tensors, kind) in enumerate(zip(layers, kinds, strict=True)):
        for name in filter(re.compile(_STATE).fullmatch, tensors):
            own = tensors[name].shape
            other, shape = first.setdefault((kind, name), (index, own))
            if shape != own:
                raise AHNError(
                    f"{where} is damaged: layers.{index}.{name} has shape {own}, that of layer {other} {shape}."
                )


def _check_other_layer(tensors: dict[str, Stored], seen: int, held: int | None, batch: int, where: str) -> None:
    """A layer without a memory: the first size of its tensors is the batch, the third of its keys what it holds."""
    for name in tensors:
        if not re.fullmatch(f"keys|values|{_STATE}", name):
            raise AHNError(f"{where} holds a tensor {name[:80]!r} that no layer without a memory has.")
    _check_states(tensors, batch, where)
    keys, values = tensors.get("keys"), tensors.get("values")
    if (keys is None) != (values is None):
        raise AHNError(f"{where}.{'keys' if keys is None else 'values'} is missing.")
    if keys is None or values is None:
        return
    if keys.dtype not in FLOATS or keys.dtype != values.dtype or len(keys.shape) != 4 or len(values.shape) != 4:
        raise AHNError(f"{where}: keys {keys.dtype} {keys.shape} and values {values.dtype} {values.shape} do not fit.")
    length = keys.shape[2]
    if keys.shape[:3] != values.shape[:3] or not 0 < length <= seen or length != (held or length):
        raise AHNError(f"{where} holds {length} keys and {values.shape[2]} values after {seen} tokens.")


def _compare(found: Mapping[str, Stored], wanted: Mapping[str, Stored], where: str) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise AHNError(f"{where}.{missing[0]} is missing.")
    if extra := sorted(found.keys() - wanted.keys()):
        raise AHNError(f"{where}.{extra[0][:80]} does not belong to a conversation of this model.")
    for name, stored in wanted.items():
        if found[name] != stored:
            raise AHNError(f"{where}.{name} is {found[name].dtype} {found[name].shape}, expected {stored}.")
