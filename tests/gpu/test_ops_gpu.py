"""The scan's kernels on a GPU in bfloat16, forward and backward, and what models make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import relative_error
from models import RECURRENT, RULED, adapted, awaken, base, tokens
from support.kernels import INTERPRETED, NAMES, RULES
from support.scans import GATES, errors_of, inputs, outputs_and_gradients, several_states
from torch import Tensor

import ahn
from ahn import ops
from ahn.ops import scan
from ahn.ops.rule import StepRule
from ahn.ops.scan import chunked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]

# Products of bfloat16 factors (each within 2^-9) summed in float32: rounding of some products in a row, q·k·state·β.
BF16 = 8 * 2**-8
# On ordinary inputs roundings are independent and average out; a factor that is transposed or left out does not hide.
TYPICAL = 1e-2


def in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    decay: Tensor | None,
    state: Tensor,
    rule: StepRule,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan as `ahn.ops.scan.chunked` computes it in the precision of the state, one state a query head."""
    assert share is None
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.to(state.dtype) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q = query * torch.rsqrt(query.square().sum(-1, keepdim=True) + rule.l2_eps) * rule.scale
    k = key * torch.rsqrt(key.square().sum(-1, keepdim=True) + rule.l2_eps)
    if rule.delta:
        return chunked.delta_rule(q, k, value, write, decay, state)
    assert decay is not None
    return chunked.decay_rule(q, k, value * write[..., None], decay, state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("P", [64, 128])
@pytest.mark.parametrize("length", [1, 64, 333])
def test_gradients(name: str, P: int, length: int) -> None:
    """Against float64, one token at a time; half of all keys nearly repeat, which bfloat16 feels."""
    errors = errors_of(name, inputs(name, length, 8, 2, P, torch.bfloat16))
    print(name, P, length, {part: f"{error:.1e}" for part, error in errors.items()})
    assert max(errors.values()) < 2 * BF16, errors  # the backward rounds what the forward has rounded


@pytest.mark.parametrize("P", [64, 128])
def test_gradients_of_what_several_states_share(P: int) -> None:
    errors = errors_of("deltanet", several_states(333, P, torch.bfloat16))
    assert max(errors.values()) < 2 * BF16, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gates", [gate for gate in GATES if gate != "usual"])
def test_gates_at_their_ends(name: str, gates: str) -> None:
    errors = errors_of(name, inputs(name, 200, 4, 2, 64, torch.bfloat16, gates))
    print(name, gates, {part: f"{error:.1e}" for part, error in errors.items()})
    assert max(errors.values()) < 2 * BF16, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(28, 4, 128), (16, 2, 128), (8, 2, 64)])
def test_long_scans_of_real_shapes(name: str, shape: tuple[int, int, int]) -> None:
    from ahn.ops.scan.gradients import Scan

    heads, kv_heads, P = shape
    rule, r = RULES[name], torch.Generator("cuda").manual_seed(0)
    assert rule is not None

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=r, device="cuda")

    given = {
        "query": normal(1, heads, 4000, P).bfloat16(),
        "key": normal(1, kv_heads, 4000, P).bfloat16(),
        "value": normal(1, kv_heads, 4000, P).bfloat16(),
        "write": torch.sigmoid(normal(1, heads, 4000)),
        "decay": -0.1 * torch.rand(1, heads, 4000, generator=r, device="cuda") if rule.decay else None,
        "state": 0.1 * normal(1, heads, P, P),
    }
    weights = [normal(1, heads, 4000, P).double(), normal(1, heads, P, P).double()]
    exact = {part: None if x is None else x.double() for part, x in given.items()}
    found = outputs_and_gradients(Scan.apply, given, rule, weights)
    wanted = outputs_and_gradients(in_chunks, exact, rule, weights)
    errors = {part: relative_error(found[part].double().cpu(), x.cpu()) for part, x in wanted.items()}
    print(name, shape, {part: f"{error:.1e}" for part, error in errors.items()})
    assert max(errors.values()) < TYPICAL, errors


@pytest.mark.parametrize("memory", RULED)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_learns_what_it_learns_in_float32(memory: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 base, or a float32 one under autocast, with a memory in float32: through kernels, and in chunks."""
    from ahn.ops.scan.gradients import Scan

    calls: list[torch.dtype] = []
    original = Scan.apply

    def apply(*given: Any) -> Any:
        calls.append(given[0].dtype)
        return original(*given)

    monkeypatch.setattr(Scan, "apply", apply)
    model = awaken(ahn.attach(base(head_dim=64), ahn.AHNConfig(memory=memory, window=12, sinks=2))).cuda()
    if not autocast:
        model.bfloat16()
        for layer in model.model.layers:
            layer.ahn.float()
    own = {name: x for name, x in model.named_parameters() if ".ahn" in name}
    ids, gradients = tokens(2, 200).cuda(), []
    for backend in (None, "chunked"):
        model.zero_grad()
        with ops.use_backend(backend), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(ids, use_cache=False).logits.float()
        (logits * torch.linspace(-1, 1, logits.numel(), device="cuda").view_as(logits).sin()).sum().backward()
        gradients.append(torch.cat([x.grad.double().flatten() for x in own.values() if x.grad is not None]))
    assert calls == [torch.bfloat16] * len(model.model.layers)
    # Reads differ by BF16, and the bfloat16 model around them, with its sharp attention, rounds to other numbers; a
    # wrong gradient is off by its own size.
    assert relative_error(gradients[0].cpu(), gradients[1].cpu()) < 4 * BF16


def test_what_kernels_take() -> None:
    def query(P: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 1, 2, P, dtype=dtype, device="cuda")

    for dtype, without, under in [
        (torch.bfloat16, True, True), (torch.float16, True, False), (torch.float32, False, False)
    ]:  # fmt: skip
        with torch.no_grad():
            assert scan.has_kernel(query(64, dtype)) == without
        assert scan.has_kernel(query(64, dtype)) == under
    assert not any(scan.has_kernel(query(P, torch.bfloat16)) for P in (8, 16, 32, 48, 256))
    with torch.autocast("cuda", torch.bfloat16):
        assert scan.has_kernel(query(64, torch.float32))
    with ops.use_backend("chunked"):
        assert not scan.has_kernel(query(64, torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize("memory", RECURRENT)
def test_a_model_on_a_gpu(memory: str) -> None:
    """Prefill in chunks, then steps, the same model on the CPU; and a cache kept on the CPU."""
    model = adapted("qwen3", memory=memory, window=12, sinks=2, prefill_chunk_size=32)
    ids = tokens(2, 90)
    expected = model(ids, use_cache=False).logits
    model = model.cuda()
    for offloading in (False, True):
        cache = ahn.AHNCache.for_model(model, offloading=offloading)
        parts = [model(ids[:, :80].cuda(), past_key_values=cache).logits]
        parts += [model(ids[:, t : t + 1].cuda(), past_key_values=cache).logits for t in range(80, 90)]
        # Two layers, whose products with weights may take TF32.
        assert relative_error(torch.cat(parts, dim=1).cpu(), expected) < 2 * BF16
        if offloading:
            assert all(
                x.device.type == "cpu" for layer in cache.memory_layers.values() for x in layer.tensors().values()
            )
