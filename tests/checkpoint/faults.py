"""Ways in which an adapter's directory can be wrong, each with the words its error must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tiny_checkpoints import edit_config, edit_weights

NAME = "model.layers.1.ahn.fn.b_proj.weight"


def _rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: (path / old).rename(path / new)


def _truncate(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])


def _pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda p: edit_weights(p, lambda t: t.pop(NAME)), r"lacks 1 of 30 .*layers\.1\.ahn\.fn\.b_proj"),
    "missing layer": (
        lambda p: edit_weights(p, lambda t: [t.pop(n) for n in list(t) if ".layers.2." in n]),
        r"lacks 10 of 30 .*layers\.2\.",
    ),
    "extra tensor": (
        lambda p: edit_weights(p, lambda t: t.update({"model.layers.1.ahn.fn.q_proj.weight": torch.ones(4, 8, 8)})),
        r"1 AHN tensors that it should not have.*q_proj",
    ),
    "extra layer": (
        lambda p: edit_weights(p, lambda t: t.update({NAME.replace(".1.", ".3."): t[NAME].clone()})),
        r"should not have.*layers\.3\.",
    ),
    "two decoders": (
        lambda p: edit_weights(p, lambda t: t.update({f"other.{NAME}": t[NAME].clone()})),
        "more than one decoder",
    ),
    "wrong shape": (
        lambda p: edit_weights(p, lambda t: t.update({NAME: t[NAME].T.contiguous()})),
        r"b_proj\.weight has shape \(32, 4\) instead of \(4, 32\)",
    ),
    "NaN": (lambda p: edit_weights(p, lambda t: t[NAME].view(-1)[5:6].fill_(torch.nan)), r"layers\.1.*NaN"),
    "infinity": (lambda p: edit_weights(p, lambda t: t[NAME].fill_(torch.inf)), "infinite"),
    "integers": (lambda p: edit_weights(p, lambda t: t.update({NAME: t[NAME].int()})), "I32"),
    "truncated": (_truncate, "truncated"),
    "pickle": (_pickle, "pickled"),
    "no weights": (_rename("model.safetensors", "weights.safetensors"), "neither model.safetensors nor"),
    "no config": (_rename("config.json", "configuration.json"), "has no config.json"),
    "config is no JSON": (lambda p: (p / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "JSON object"),
    "other router": (
        lambda p: edit_config(p, lambda c: c["ahn"].update(router=False)),
        r"6 AHN tensors that it should not have.*ahn_router",
    ),
    "layer beyond": (lambda p: edit_config(p, lambda c: c["ahn"].update(full_attention_layers=[3])), "layers 0 to 2"),
    "other base": (lambda p: edit_config(p, lambda c: c.update(hidden_size=64)), "hidden_size 32 instead of 64"),
}
