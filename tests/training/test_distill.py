"""One step of self-distillation: who teaches whom, on which positions, and where gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_student import freeze_base, scaled_head, student, tokens
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.training import Distillation, check_head, distillation_loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in ahn.adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: Distillation, expected: Distillation) -> None:
    """To float32 rounding: the same sums in another order."""
    assert found.valid == expected.valid
    torch.testing.assert_close(torch.stack(found[:4]), torch.stack(expected[:4]), rtol=1e-5, atol=1e-6)


def test_equals_the_definition() -> None:
    model, ids = student(), tokens(2, 40)
    with torch.no_grad():
        found = distillation_loss(model, ids, window=6, sinks=4, loss="kl+ce", chunk=7)
        s = model(ids, use_cache=False).logits.log_softmax(-1)
        with ahn.disabled(model):
            t = model(ids, use_cache=False).logits.log_softmax(-1)
    s, t, labels = s[:, 10:-1], t[:, 10:-1], ids[:, 11:]
    kl = (t.exp() * (t - s)).sum(-1).mean()
    ce, teacher_ce = (F.nll_loss(x.flatten(0, 1), labels.flatten()) for x in (s, t))
    assert kl > 0.01, "the student must differ from its teacher for this test to mean anything"
    assert_same(found, Distillation(kl + ce, kl, ce, teacher_ce, valid=2 * 29))


@pytest.mark.parametrize("memory", ahn.memory.recurrent())
@torch.no_grad()
def test_where_a_sequence_starts_matters_to_a_memory_that_sees_positions(memory: str) -> None:
    model, ids = student(memory=memory), tokens(2, 40)
    here, there = (distillation_loss(model, ids, window=8, sinks=2, start=start) for start in (0, 500))
    # Angles around 500 are off by 2^-15: that is all that full attention, and distances, know of it.
    torch.testing.assert_close(there.teacher_ce, here.teacher_ce, rtol=1e-3, atol=0)
    same = abs(float(there.kl / here.kl) - 1) < 1e-3
    assert same != ahn.memory.get(memory).sees_positions


def test_the_window_stays() -> None:
    model = student()
    distillation_loss(model, tokens(1, 20), window=5, sinks=3)
    assert (model.ahn_config.window, model.ahn_config.sinks) == (5, 3)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_teacher_leaves_no_graph(frozen: bool) -> None:
    """Neither when the base's own weights could take gradients, and its hidden states are all that is left of it."""
    model = freeze_base(student()) if frozen else student()
    passes: list[bool] = []
    model.get_decoder().register_forward_hook(lambda *call: passes.append(call[-1].last_hidden_state.requires_grad))
    distillation_loss(model, tokens(2, 30), window=8, sinks=2)
    assert passes == [False, True], "the teacher without a graph, then the student with one"


def test_gradients_reach_the_adapter_alone() -> None:
    model = freeze_base(student())
    distillation_loss(model, tokens(2, 30), window=8, sinks=2, loss="kl+ce+distill").loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    unused = {name for name in ahn.adapter_parameters(model) if name.endswith("fn.D")}
    assert with_gradient == set(ahn.adapter_parameters(model)) - unused


@pytest.mark.parametrize("memory", ahn.memory.recurrent())
def test_gradient_checkpointing_changes_nothing(memory: str) -> None:
    model, ids = freeze_base(student(memory=memory)), tokens(2, 30)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})  # the name in every version
        distillation_loss(model, ids, window=8, sinks=2, loss="kl+distill").loss.backward()
        found.append(gradients(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=0)  # the same operations run twice


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss", ["kl+ce", "distill"])
def test_a_padded_row_counts_as_it_does_alone(side: str, loss: str) -> None:
    model, rows = freeze_base(student()), [tokens(1, 30, seed=1), tokens(1, 22, seed=2)]
    alone = [distillation_loss(model, row, window=8, sinks=2, loss=loss) for row in rows]
    sum(d.loss * d.valid for d in alone).backward()
    expected = gradients(model)

    pads = [(30 - row.shape[1], 0) if side == "left" else (0, 30 - row.shape[1]) for row in rows]
    batch = {
        "input_ids": torch.cat([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)]),
    }
    found = distillation_loss(model, batch, window=8, sinks=2, loss=loss)
    (found.loss * found.valid).backward()
    total = sum(d.valid for d in alone)
    means = [sum(d[i] * d.valid for d in alone) / total for i in range(4)]
    # Left padding shifts RoPE's angles, which rounds differently: about 1e-6 of the hidden states.
    assert found.valid == total
    torch.testing.assert_close(torch.stack(found[:4]), torch.stack(means), rtol=1e-4, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item())


@pytest.mark.parametrize("loss", ["kl+ce", "distill"])
def test_parts_of_a_batch_add_up(loss: str) -> None:
    """Micro-batches with 3, 0 and many positions that count: gradients are those of one batch, not a mean of means."""
    model = freeze_base(student())
    ids = tokens(3, 30)
    labels = ids.clone()
    labels[0, 14:], labels[1, :] = -100, -100
    whole = distillation_loss(model, {"input_ids": ids, "labels": labels}, window=8, sinks=2, loss=loss)
    whole.loss.backward()
    expected = gradients(model)
    parts = []
    for row in range(3):
        batch = {"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]}
        parts.append(distillation_loss(model, batch, window=8, sinks=2, loss=loss, count=whole.valid))
        parts[-1].loss.backward()
    assert [part.valid for part in parts] == [3, 0, 19]
    found = Distillation(*(sum(part[i] for part in parts) for i in range(5)))
    assert_same(found, whole)
    for name, gradient in gradients(model).items():
        # float32 sums in another order
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * expected[name].abs().max().item())


def test_labels_choose_what_is_learned() -> None:
    """Only the token at 20 is to be learned, so only position 19 counts: the loss of that position alone."""
    model, ids = student(), tokens(1, 40)
    labels = torch.full_like(ids, -100)
    labels[0, 20] = ids[0, 20]
    with torch.no_grad():
        found = distillation_loss(model, {"input_ids": ids, "labels": labels}, window=8, sinks=2, loss="ce")
        logits = model(ids, use_cache=False).logits[0, 19]
    assert found.valid == 1
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, ids[0, 20]), rtol=1e-5, atol=1e-6)


def test_attention_distillation_sees_the_layers_with_a_memory() -> None:
    """The first layer reads the same input in both passes; its outputs differ by window and memory alone."""
    model, ids = student(full_attention_layers=(1,)), tokens(2, 30)
    outputs: list[Tensor] = []
    handle = model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
    with torch.no_grad():
        plain = distillation_loss(model, ids, window=8, sinks=2, loss="distill")
        normalised = distillation_loss(model, ids, window=8, sinks=2, loss="distill", use_normalized_l2=True)
    handle.remove()
    teacher, learner = (out[:, 10:-1] for out in outputs[:2])
    torch.testing.assert_close(plain.loss, F.mse_loss(learner, teacher), rtol=1e-5, atol=1e-7)
    unit = F.mse_loss(F.normalize(learner, dim=-1), F.normalize(teacher, dim=-1))
    torch.testing.assert_close(normalised.loss, unit, rtol=1e-5, atol=1e-7)


def test_a_bfloat16_base_trains_a_float32_adapter() -> None:
    model = student()
    for name, parameter in model.named_parameters():
        if name not in ahn.adapter_parameters(model):
            parameter.data = parameter.data.bfloat16()
    distillation_loss(freeze_base(model), tokens(1, 30), window=8, sinks=2, loss="kl+distill").loss.backward()
    found = gradients(model)
    assert found and all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in found.values())


@pytest.mark.parametrize(
    ("batch", "word"),
    [
        ({"labels": tokens(1, 30)}, "input_ids"),
        (tokens(1, 30)[0], "same shape"),
        ({"input_ids": tokens(1, 30), "labels": tokens(1, 29)}, "same shape"),
        (tokens(1, 11), r"T = 10 in sequences of L = 11"),
    ],
)
def test_wrong_batches_are_refused(batch: Tensor | dict[str, Tensor], word: str) -> None:
    with pytest.raises(ahn.AHNError, match=word):
        distillation_loss(student(), batch, window=8, sinks=2)


def test_a_head_of_another_kind_is_refused() -> None:
    with pytest.raises(ahn.AHNError, match="GraniteForCausalLM"):
        check_head(scaled_head())
    check_head(student())
