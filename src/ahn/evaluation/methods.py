"""What is compared: a memory, and the baselines without one, on the same code path and with the same number of keys."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ahn import memory, private, tiny
from ahn.checkpoint.directory import Checkpoint
from ahn.checkpoint.loading import ModelSource
from ahn.config import AHNConfig, Reach, overridden
from ahn.errors import AHNError
from ahn.measure.method import Method
from ahn.shape import trained_length

METHODS = {
    "ahn": "sinks, window and the adapter's memory",
    "window": "sinks and window, what leaves is forgotten",
    "full": "full attention, the model as it is",
    "ct-max": "Compressive Transformer, evicted tokens pooled by their maximum",
    "ct-avg": "Compressive Transformer, evicted tokens pooled by their mean",
}
"""Names and what they are."""
BASELINES = {"window": "window_only", "ct-max": "ct_max", "ct-avg": "ct_avg"}
"""Method -> memory; the others need none, or the adapter's."""
SAMPLED = 1 << 20
"""Bytes of a weights file that are looked at in full from each of `PLACES` places; a smaller one is read whole."""
PLACES = 64
PATHS = ("_name_or_path", "base_model_name_or_path")
"""Of a configuration: where weights once lay, which changes nothing."""
SHIPPED = "ahn-tiny"
"""What results call the model that comes with ahn, whose directory is just called model."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A model as a method uses it.

    Attributes:
        settings: everything of it that a score depends on, as JSON types.
        about: where it came from, which no score depends on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: str
    settings: dict[str, Any]
    about: dict[str, Any]


def load(
    method: str,
    model: str,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **reach: Unpack[Reach],
) -> Evaluated:
    """Load a model for a method.

    Args:
        model: a base model, a merged checkpoint or an adapter; all methods but "ahn" take the base in it.
        adapter: for a base model. Methods other than "ahn" take only the default window and sinks from it, and which
            layers keep full attention.
        reach: of the memory and of its baselines: CT's slots are taken from this window.
    """
    if method not in METHODS:
        raise AHNError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    source = ModelSource.open(model, adapter, **reach)
    loaded, tokenizer = source.load_ready(device, dtype, memory=method == "ahn")
    if method != "ahn":
        make(method, source.settings or of_base(loaded), **reach).attach(loaded)
    used, named = [source.base], None
    if source.adapter is not None:
        named = adapter or model
        used += [source.adapter] if method == "ahn" else []
    return of_loaded(method, loaded, tokenizer, str(source.name), used, named)


def of_loaded(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    used: Sequence[Checkpoint],
    adapter: str | None,
) -> Evaluated:
    """A model that is loaded, and reads as the method does.

    Args:
        name: directory or Hub id of the base model.
        used: where its weights are from.
        adapter: what the adapter is called, if there is one.
    """
    settings = describe(model, method) | {"weights": [fingerprint(part) for part in used]}
    settings |= {"model": _name(name), "tokenizer": _tokenizer_fingerprint(tokenizer)}
    return Evaluated(model, tokenizer, method, settings, {"model": name, "adapter": adapter})


def of_base(model: PreTrainedModel) -> AHNConfig:
    """What a model is compared at that has no AHN: window and sinks follow the base."""
    return AHNConfig.for_base(trained_length(model.config))


def make(method: str, settings: AHNConfig, **reach: Unpack[Reach]) -> Method:
    """Full attention or a baseline, for a bare model.

    Args:
        settings: of the AHN that it is compared with.
    """
    config = overridden(settings, router=False, q_proj=False, calibrated_keys=False, **reach)
    return Method(method, None if method == "full" else baseline(method, config))


def baseline(method: str, config: AHNConfig) -> AHNConfig:
    """The configuration of a baseline that keeps as many keys: sinks + window + slots = the lossless total."""
    name = BASELINES[method]
    return config.replace(memory=name, window=memory.window_within(name, config.window, config.quantized))


def describe(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """Method, memory, window and sinks of a model in use, as JSON types."""
    config: AHNConfig | None = getattr(model, "ahn_config", None)
    found: dict[str, Any] = {"method": method, "dtype": str(model.dtype).removeprefix("torch.")}
    found |= {"device": model.device.type, "attention": _kernel(model)}
    if config is None:
        return found | {"memory": None}
    slots = memory.slot_count(config.memory, config.window + config.quantized, config.slots)
    settings = dataclasses.asdict(config)
    if not config.quantized and not memory.get(config.memory).keeps_tokens:  # as in results from before there were bits
        for name in ("quantized", "key_bits", "value_bits", "keys_before_rope"):
            del settings[name]
    if not (config.quantized and config.calibrated_keys):
        del settings["calibrated_keys"]
    if config.slot_heads is None:
        del settings["slot_heads"]
    if config.passage == 1:
        del settings["passage"]
    if config.score_layer is None:
        del settings["score_layer"]
    shared = slots if config.memory in memory.baselines() else 0  # a trained memory's are its state
    return found | settings | {"slots": slots, "budget": config.lossless + shared}


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's configuration and weights.

    Files of up to 64 MiB are read whole. Of a larger one it is the header, with every tensor's name and shape, and a
    mebibyte at each of 64 places: enough to tell trainings apart in a second, whatever the model's size.
    """
    config = {name: value for name, value in checkpoint.config.items() if name not in PATHS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            if size <= SAMPLED * PLACES:
                digest.update(stream.read())
                continue
            for place in range(PLACES):
                stream.seek((size - SAMPLED) * place // (PLACES - 1))
                digest.update(stream.read(SAMPLED))
    return digest.hexdigest()


def _name(base: str) -> str:
    """What results call a base model."""
    path = Path(base)
    if path.resolve() == tiny.path().resolve():
        return SHIPPED
    # in the Hub's cache: models--OWNER--NAME/snapshots/COMMIT
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def _kernel(model: PreTrainedModel) -> str:
    adapter = getattr(model, "_ahn", None)
    return adapter.kernel if adapter is not None else private.attention_kernel(model.config)


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template or ""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{template}\0{backend}".encode()).hexdigest()
