"""What products in 8 bits cost a real model: float8 with a scale per row of weights and per token of inputs.

    python benchmarks/quality/float8.py --out float8.jsonl --texts moby-dick:2048:8

SmolLM2 with the adapter `tier`, in bfloat16: the mean loss of pieces of a text beyond the exact tokens, as it is and
with all projections of the decoder's layers in 8 bits. The package has no such products; a base whose projections were
replaced before `ahn.attach` has them, as the few lines here do, or a library.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from real.reading import pieces, text_losses, tokens_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import ahn
from ahn.bench.model import load
from ahn.bench.records import hardware
from ahn.checkpoint.loading import load_tokenizer
from ahn.cli.env import environment
from ahn.smollm2 import adapter_path, path

BATCH = 8
"""Texts that are read at once."""


class Float8Linear(nn.Linear):
    """A projection whose weights (a scale per row) and inputs (one per token, found as they come) have 8 bits."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight, scale = _rounded(plain.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", scale.t().contiguous())

    def forward(self, input: Tensor) -> Tensor:
        flat, scale = _rounded(input.flatten(0, -2))
        out = torch._scaled_mm(flat, self.weight.t(), scale, self.scale, self.bias, out_dtype=input.dtype)
        return out.unflatten(0, input.shape[:-1])


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (n, K) in 8 bits, and the scale (n, 1) of each row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def to_float8(model: PreTrainedModel) -> None:
    """Let all projections of the decoder's layers multiply in 8 bits.

    On a GPU each is compiled: rounding is else five passes over its inputs.
    """
    for layer in model.get_decoder().layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, own = name.rpartition(".")
                new = Float8Linear(module)
                if module.weight.is_cuda:
                    new.compile(dynamic=True)
                setattr(layer.get_submodule(owner), own, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", default="moby-dick:2048:8", help="a text by name or file, tokens, pieces")
    parser.add_argument("--out", type=Path, required=True, help="append the lines to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, length, count = options.texts.rsplit(":", 2)
    ids = pieces(tokens_of(load_tokenizer(Path(path())), name), int(length), int(count))
    rows: list[dict[str, Any]] = [{"kind": "run", "hardware": hardware(device), "environment": environment()}]
    each: dict[str, list[float]] = {}
    for products in ("bfloat16", "float8"):
        model = load("smollm2", False, device, torch.bfloat16).model
        if products == "float8":
            to_float8(model)
        exact = ahn.load_adapter(model, adapter_path("tier")).ahn_config.lossless
        each[products], _ = text_losses(model, ids, exact, BATCH)
        rows.append({"products": products, "texts": options.texts, "loss": statistics.fmean(each[products])})
        rows[-1]["losses"] = each[products]
    more = [b - a for a, b in zip(each["bfloat16"], each["float8"], strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5
    rows.append({"products": "float8 less bfloat16", "loss": statistics.fmean(more), "standard_error": error})
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row), file=file)
    for row in rows[1:]:
        print(f"{row['products']:22s} {row['loss']:.4f}" + (f" ± {error:.4f}" if "standard_error" in row else ""))


if __name__ == "__main__":
    main()
