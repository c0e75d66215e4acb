"""Make the two small golden cases in this folder: `python tests/golden/make.py`.

The numbers come from `tests/oracle.py`: the specification in float64, one token at a time, with a decoder and attention
of its own. Of the package only the layout of the weights is used. Files and names are those of the published cases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import oracle  # noqa: E402
from golden import base_model  # noqa: E402

import ahn  # noqa: E402

_COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "intermediate_size": 48,
    "sliding_window": 11,
    "num_attn_sinks": 3,
    "prefill_length": 45,
    "decode_steps": 14,
    "batch": 1,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "train_window": 12,
    "train_sinks": 0,
}
CASES = [
    {"family": "qwen2", "ahn": "GatedDeltaNet", "seed": 11, "head_dim": 8} | _COMMON,
    {"family": "qwen3", "ahn": "Mamba2", "seed": 12, "head_dim": 16} | _COMMON,
]


def make(case: dict[str, Any]) -> None:
    """Write one case."""
    base, adapter = weights(case)
    ids = torch.randint(case["vocab_size"], (case["batch"], case["prefill_length"] + case["decode_steps"]))
    expected = {"input_ids": ids} | forward_numbers(case, base | adapter, ids)
    for loss in ("kl", "ce"):
        expected |= training_numbers(case, base, adapter, ids[:, : case["prefill_length"]], loss)
    folder = FOLDER / f"{case['family']}-{case['ahn']}"
    folder.mkdir(exist_ok=True)
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    for name, tensors in (("base", base), ("ahn", adapter), ("expected", expected)):
        kept = {key: (x.float() if x.is_floating_point() else x).contiguous() for key, x in tensors.items()}
        save_file(kept, folder / f"{name}.safetensors")


@torch.no_grad()
def weights(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of the base and of an AHN at work: float32 numbers in float64 tensors."""
    torch.manual_seed(case["seed"])
    model = base_model(case)
    base = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    memory = next(name for name in ahn.memory.names() if ahn.memory.get(name).published_name == case["ahn"])
    ahn.attach(model, ahn.AHNConfig(memory=memory))
    adapter = {name: p.detach() for name, p in ahn.adapter_parameters(model).items()}
    for name, x in (base | adapter).items():
        if x.dim() > 1:
            x.normal_(std=x.shape[-1] ** -0.5)
        elif not name.endswith(("A_log", "dt_bias")):
            x += 0.1 * torch.randn_like(x)
    return {name: x.double() for name, x in base.items()}, {name: x.double() for name, x in adapter.items()}


def forward_numbers(case: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Logits, kept keys and states."""
    length, window, sinks = case["prefill_length"], case["sliding_window"], case["num_attn_sinks"]
    logits, keys, states = oracle.decoder(case, w, ids, window, sinks, (length, ids.shape[1]))
    teacher, _, _ = oracle.decoder(case, w, ids[:, :length], window=length, sinks=0)
    numbers = {
        "prefill_logits": logits[:, :length],
        "decode_logits": logits[:, length:],
        "oneshot_logits": logits,
        "teacher_logits": teacher,
    }
    for i, (key, both) in enumerate(zip(keys, states, strict=True)):
        kept = [*range(sinks), *range(length - window, length)]
        numbers[f"cached_keys_after_prefill.{i}"] = key[:, :, kept]
        for when, state in zip(("prefill", "decode"), both, strict=True):
            # Published states of Mamba2 are (value, key).
            numbers[f"state_after_{when}.{i}"] = state.mT if case["ahn"] == "Mamba2" else state
    return numbers


def training_numbers(
    case: dict[str, Any], base: dict[str, Tensor], adapter: dict[str, Tensor], ids: Tensor, loss: str
) -> dict[str, Tensor]:
    """A published training loss and its gradients, with the quirks that the published cases have."""
    T = case["train_window"] + case["train_sinks"]
    trained = {name: x.clone().requires_grad_() for name, x in adapter.items()}
    student, _, _ = oracle.decoder(case, base | trained, ids, case["train_window"], case["train_sinks"])
    student = student[:, T:].log_softmax(-1)
    if loss == "kl":  # over all positions from T on, the last one included
        teacher, _, _ = oracle.decoder(case, base | adapter, ids, window=ids.shape[1], sinks=0)
        teacher = teacher[:, T:].log_softmax(-1)
        value = (teacher.exp() * (teacher - student)).sum(-1).mean()
    else:  # positions from T on, flattened, then shifted by one
        value = F.nll_loss(student.flatten(0, 1)[:-1], ids[:, T:].flatten()[1:])
    value.backward()
    gradients = {f"grad_{loss}.{name}": x.grad for name, x in trained.items() if x.grad is not None}
    return {f"train_{loss}_loss": value.detach()[None]} | gradients


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in CASES:
        make(one)
