"""Chunked losses equal the plain ones on full logits, in value and gradient, and never build the full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahn.errors import AHNError
from ahn.training.losses import IGNORED, Head, attention_loss, hidden_losses, next_tokens, parse_loss, valid_positions

B, L, D, V = 2, 19, 12, 57


def example(
    dtype: torch.dtype, softcap: float | None, bias: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Head]:
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(B, L, D, generator=g)
    student = teacher + 0.3 * torch.randn(B, L, D, generator=g)
    positions = torch.rand(B, L, generator=g) < 0.6
    targets = torch.randint(V, (B, L), generator=g).masked_fill(~positions, IGNORED)
    head = Head(
        torch.randn(V, D, generator=g).to(dtype), torch.randn(V, generator=g).to(dtype) if bias else None, softcap
    )
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_(), targets, positions, head


def plain(student: Tensor, teacher: Tensor, targets: Tensor, positions: Tensor, head: Head) -> tuple[Tensor, ...]:
    """The definitions, on the logits of every position at once. The bfloat16 inputs are exact in float32."""

    def log_probabilities(hidden: Tensor) -> Tensor:
        logits = hidden.float() @ head.weight.float().t()
        if head.bias is not None:
            logits = logits + head.bias.float()
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits.log_softmax(-1)[positions]

    s, t, labels = log_probabilities(student), log_probabilities(teacher.detach()), targets[positions]
    kl = (t.exp() * (t - s)).sum(-1).mean()
    return kl, F.nll_loss(s, labels), F.nll_loss(t, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=["kl", "ce", "kl+ce"])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (3.0, False), (None, True)])
def test_equals_full_logits(
    dtype: torch.dtype, chunk: int, weights: tuple[float, float], softcap: float | None, bias: bool
) -> None:
    student, teacher, targets, positions, head = example(dtype, softcap, bias)
    found = hidden_losses(student, teacher, targets, positions, head, *weights, chunk=chunk)
    (3 * found.loss).backward()
    gradient, student.grad = student.grad, None

    kl, ce, teacher_ce = plain(student, teacher, targets, positions, head)
    loss = weights[0] * kl + weights[1] * ce
    (3 * loss).backward()
    # Both sides work in float32 from the same numbers; sums of at most V · N terms leave a few ulp (6e-8 each).
    torch.testing.assert_close(torch.stack(found), torch.stack([loss, kl, ce, teacher_ce]), rtol=1e-5, atol=1e-6)
    assert teacher.grad is None
    assert found.loss.requires_grad and not (found.kl.requires_grad or found.ce.requires_grad)
    assert gradient is not None and gradient.dtype == dtype and student.grad is not None
    # float32: rounding of logits of ~10, so about 1e-6 of a probability. bfloat16: the plain gradient is rounded once
    # (2^-9 relative), ours once more when it is scaled by 3.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    scale = student.grad.abs().max().item()
    torch.testing.assert_close(gradient, student.grad, rtol=tolerance, atol=tolerance * scale)
    assert gradient[~positions].eq(0).all()


def test_no_gradient_without_a_graph() -> None:
    student, teacher, targets, positions, head = example(torch.float32, None, False)
    with torch.no_grad():
        assert not hidden_losses(student, teacher, targets, positions, head).loss.requires_grad


def test_loss_of_weight_zero_gives_zero_gradient() -> None:
    """The loss "distill" alone still wants the metrics."""
    student, teacher, targets, positions, head = example(torch.float32, None, False)
    found = hidden_losses(student, teacher, targets, positions, head, kl=0.0, ce=0.0)
    (found.loss + 2 * student.sum()).backward()
    assert found.kl > 0
    assert student.grad is not None and student.grad.eq(2).all()


def test_equal_hidden_states_have_no_divergence() -> None:
    student, _, targets, positions, head = example(torch.float32, None, False)
    found = hidden_losses(student, student, targets, positions, head)
    found.loss.backward()
    assert found.kl.item() == 0
    assert found.ce.item() == found.teacher_ce.item()
    assert student.grad is not None and student.grad.abs().max() == 0


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Remembers the most elements of any tensor that an operation returned."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_of_all_positions_times_vocabulary() -> None:
    n, d, v, chunk = 256, 8, 128, 16
    student = torch.randn(1, n, d, requires_grad=True)
    targets, positions = torch.zeros(1, n, dtype=torch.long), torch.ones(1, n, dtype=torch.bool)
    with LargestTensor() as largest:
        hidden_losses(
            student, torch.randn(1, n, d), targets, positions, Head(torch.randn(v, d)), 1.0, 1.0, chunk
        ).loss.backward()
    assert largest.numel == max(chunk * v, n * d)


def test_positions_that_count() -> None:
    labels = torch.tensor([[10, 11, 12, IGNORED, 14, 15]])
    targets = next_tokens(labels)
    assert targets.tolist() == [[11, 12, IGNORED, 14, 15, IGNORED]]
    # From T = 1: position 2 predicts a masked token, position 5 predicts nothing; reading a masked token (3) is fine.
    assert valid_positions(targets, 1).tolist() == [[False, True, False, True, True, False]]
    assert valid_positions(targets, 4).nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_position(side: str) -> None:
    """A padded row counts what it counts alone."""
    alone = torch.arange(10, 17)[None]
    pads = (2, 0) if side == "left" else (0, 2)
    mask = F.pad(torch.ones_like(alone), pads)
    targets = next_tokens(F.pad(alone, pads).masked_fill(mask == 0, IGNORED))
    expected = F.pad(valid_positions(next_tokens(alone), 3), pads)
    assert torch.equal(valid_positions(targets, 3, mask), expected)


def test_where_nothing_counts() -> None:
    targets = next_tokens(torch.arange(8)[None])
    assert valid_positions(targets, 6).sum() == 1
    assert not valid_positions(targets, 7).any()
    assert not valid_positions(torch.full((2, 8), IGNORED), 0).any()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 1.0)], ids=["kl", "kl+ce"])
def test_parts_add_up_to_the_whole(weights: tuple[float, float]) -> None:
    """Rows of very different numbers of positions, one of them none: losses and gradients of the parts add up."""
    student, teacher, targets, positions, head = example(torch.float32, None, False)
    positions[0, 3:] = False
    whole = hidden_losses(student, teacher, targets, positions, head, *weights)
    whole.loss.backward()
    gradient, student.grad = student.grad, None
    count = int(positions.sum())
    empty = positions[:1] & False
    rows = [(0, positions[:1]), (0, empty), (1, positions[1:])]
    parts = [
        hidden_losses(student[i : i + 1], teacher[i : i + 1], targets[i : i + 1], p, head, *weights, count=count)
        for i, p in rows
    ]
    sum(part.loss for part in parts).backward()
    # The same float32 terms, added in another order.
    for i in range(4):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-7)
    assert parts[1].loss == 0


@pytest.mark.parametrize(
    ("loss", "terms"), [("kl", ("kl",)), ("kl+ce", ("kl", "ce")), ("ce + distill", ("ce", "distill"))]
)
def test_loss_names(loss: str, terms: tuple[str, ...]) -> None:
    assert parse_loss(loss) == terms


@pytest.mark.parametrize("loss", ["", "mse", "kl+", "kl+kl", "kl,ce", "KL"])
def test_wrong_loss_names_are_refused(loss: str) -> None:
    with pytest.raises(AHNError, match="choose from kl, ce, distill"):
        parse_loss(loss)


@pytest.mark.parametrize("use_normalized_l2", [True, False])
def test_attention_loss(use_normalized_l2: bool) -> None:
    g = torch.Generator().manual_seed(1)
    student = [torch.randn(B, L, D, generator=g).requires_grad_() for _ in range(3)]
    teacher = [torch.randn(B, L, D, generator=g).requires_grad_() for _ in range(3)]
    positions = torch.rand(B, L, generator=g) < 0.5
    poisoned = [
        torch.where(positions.unsqueeze(-1), t, torch.nan) for t in teacher
    ]  # what does not count must not matter
    loss = attention_loss(student, poisoned, positions, use_normalized_l2)
    loss.backward()
    gradients = [s.grad for s in student]

    unit = (lambda x: x / x.norm(dim=-1, keepdim=True)) if use_normalized_l2 else (lambda x: x)
    copies = [s.detach().requires_grad_() for s in student]
    expected = sum(((unit(s) - unit(t)) ** 2)[positions].mean() for s, t in zip(copies, teacher, strict=True)) / 3
    assert isinstance(expected, Tensor)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)  # float32 rounding
    for gradient, copy in zip(gradients, copies, strict=True):
        torch.testing.assert_close(gradient, copy.grad, rtol=1e-5, atol=1e-7)


def test_head_reads_the_model() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        expected = model(ids, use_cache=False).logits[0]
    head = Head.of(model)
    assert head.softcap == 5.0
    torch.testing.assert_close(head.logits(hidden[0]), expected, rtol=1e-5, atol=1e-6)


def test_model_without_a_linear_head_is_refused() -> None:
    class Headless(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(AHNError, match="Headless"):
        Head.of(Headless())


def test_autocast_does_not_round_the_logits() -> None:
    student, _, _, _, head = example(torch.float32, None, False)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.logits(student[0])
    torch.testing.assert_close(found, head.logits(student[0]), rtol=0, atol=0)
