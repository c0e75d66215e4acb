"""Several documents in a row, one after the other: each as if alone, in logits, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from golden import relative_error
from models import adapted, awaken, base, tokens
from support.architectures import build
from support.sighted import seeing
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn import AHNError

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention
LENGTHS = (30, 7, 23)


def starting_anew(*lengths: int) -> Tensor:
    """Positions (1, L) of documents of these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def alone(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "phi3"])
@torch.no_grad()
def test_each_document_is_read_as_if_alone(architecture: str) -> None:
    model, ids = adapted(architecture, window=13, sinks=3, router=True, q_proj=True), tokens(1, 60)
    packed: dict[str, Any] = {"position_ids": starting_anew(*LENGTHS), "use_cache": False}
    expected = alone(model, ids, LENGTHS)
    assert relative_error(model(ids, **packed).logits, expected) < TOLERANCE
    cuts = torch.tensor([0, 30, 37, 60], dtype=torch.int32)
    of_kernels = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 30, "max_length_k": 30}
    assert relative_error(model(ids, **packed, **of_kernels).logits, expected) < TOLERANCE
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), **packed)
    assert relative_error(embedded.logits, expected) < TOLERANCE
    for keep in (5, torch.tensor([0, 31, 59])):
        rows = slice(-keep, None) if isinstance(keep, int) else keep
        assert relative_error(model(ids, **packed, logits_to_keep=keep).logits, expected[:, rows]) < TOLERANCE
    by_default = model(ids, position_ids=packed["position_ids"])  # trainers leave use_cache as it is
    assert relative_error(by_default.logits, expected) < TOLERANCE and by_default.past_key_values is None
    hidden = model(ids, **packed, output_hidden_states=True).hidden_states
    assert [x.shape for x in hidden] == [(1, 60, 32)] * 3
    assert relative_error(model(ids, **packed, return_dict=False)[0], expected) < TOLERANCE


@pytest.mark.parametrize("model_type", ["gpt_oss", "afmoe", "qwen3_5_text", "falcon_h1"])
@torch.no_grad()
def test_short_documents_do_not_see_each_other(model_type: str) -> None:
    """Though the base does not tell its masks of positions, or has layers that go on from one into the next."""
    model, ids, lengths = (
        awaken(ahn.attach(build(model_type), ahn.AHNConfig(window=13, sinks=3))),
        tokens(1, 18),
        (5, 7, 6),
    )
    found = model(ids, position_ids=starting_anew(*lengths), use_cache=False).logits
    assert relative_error(found, alone(model, ids, lengths)) < TOLERANCE


@torch.no_grad()
def test_short_documents_of_a_model_that_sees() -> None:
    model, ids, lengths = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3))), tokens(1, 18), (5, 7, 6)
    found = model(ids, position_ids=starting_anew(*lengths), use_cache=False).logits
    assert relative_error(found, alone(model, ids, lengths)) < TOLERANCE


@torch.no_grad()
def test_rows_have_boundaries_of_their_own() -> None:
    model, ids = adapted(window=13, sinks=3), tokens(2, 60)
    packed = torch.cat([starting_anew(*LENGTHS), starting_anew(45, 15)])
    expected = torch.cat([alone(model, ids[:1], LENGTHS), alone(model, ids[1:], (45, 15))])
    assert relative_error(model(ids, position_ids=packed, use_cache=False).logits, expected) < TOLERANCE


@torch.no_grad()
def test_within_the_window_it_is_the_bases_own_packed_forward() -> None:
    model, ids, plain = adapted(window=27, sinks=3), tokens(1, 60), base()
    packed: dict[str, Any] = {"position_ids": starting_anew(*LENGTHS), "use_cache": False, "labels": ids}
    found, expected = model(ids, **packed), plain(ids, **packed)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def test_a_loss_and_its_gradients_are_those_of_the_documents() -> None:
    """As a trainer calls it, with what DataCollatorWithFlattening gives."""
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    parts = ids.split(LENGTHS, dim=1)
    sum(model(part, labels=part, use_cache=False).loss * (part.shape[1] - 1) for part in parts).backward()
    expected = {name: p.grad.clone() for name, p in ahn.adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": part[0].tolist()} for part in parts])
    loss = model.train()(**batch, use_cache=False, num_items_in_batch=torch.tensor(57)).loss
    (loss * 57).backward()
    assert len(expected) > 10
    for name, gradient in expected.items():
        assert relative_error(dict(model.named_parameters())[name].grad, gradient) < TOLERANCE


@torch.no_grad()
def test_what_cannot_be_read_so_is_refused() -> None:
    model, ids = adapted(window=13, sinks=3), tokens(1, 60)
    packed: dict[str, Any] = {"position_ids": starting_anew(*LENGTHS), "use_cache": False}
    with pytest.raises(AHNError, match="output_attentions is not given"):
        model(ids, **packed, output_attentions=True)
    with pytest.raises(AHNError, match=r"position_ids that begin anew"):
        model(ids, use_cache=False, cu_seq_lens_q=torch.tensor([0, 60]))
    of_images = torch.cat([starting_anew(*LENGTHS)[None], torch.arange(60).expand(3, 1, 60)])
    with pytest.raises(AHNError, match="several documents with images"):
        model.get_decoder()(ids, position_ids=of_images, use_cache=False)


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification"])
@torch.no_grad()
def test_the_decoder_itself_reads_several_documents(head: str) -> None:
    """Trainers that keep logits small call it: TRL's, and whoever has another head."""
    torch.manual_seed(0)
    plain = getattr(transformers, f"Qwen3{head}")(base().config).eval()
    model, ids = awaken(ahn.attach(plain, ahn.AHNConfig(window=13, sinks=3))), tokens(1, 60)
    expected = torch.cat([model(part, use_cache=False)[0] for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert relative_error(model(ids, position_ids=starting_anew(*LENGTHS))[0], expected) < TOLERANCE
    causal = adapted(window=13, sinks=3)
    hidden = causal.get_decoder()(ids, position_ids=starting_anew(*LENGTHS), use_cache=False).last_hidden_state
    assert relative_error(causal.lm_head(hidden), alone(causal, ids, LENGTHS)) < TOLERANCE


@torch.no_grad()
def test_documents_within_the_window_have_one_forward_together() -> None:
    model, lengths = adapted(window=13, sinks=3), (9, 16, 30, 1, 12)
    ids, calls = tokens(1, sum(lengths)), list[int]()
    model.model.layers[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[1]))
    packed = model(ids, position_ids=starting_anew(*lengths), use_cache=False).logits
    assert calls == [38, 30]
    assert relative_error(packed, alone(model, ids, lengths)) < TOLERANCE


# -- models whose output is not logits per token -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"]
)
@torch.no_grad()
def test_other_heads_read_a_text_of_any_length_at_once(head: str) -> None:
    """With a cache and without, the same; a padded batch is its rows alone; disabled it is the base."""
    torch.manual_seed(0)
    plain = getattr(transformers, f"Qwen3{head}")(base().config).eval()
    expected, ids = [x.clone() for x in plain(tokens(2, 60)).to_tuple()[:1]], tokens(2, 60)
    model = awaken(ahn.attach(plain, ahn.AHNConfig(window=13, sinks=3, prefill_chunk_size=8)))
    with ahn.disabled(model):
        assert torch.equal(model(ids)[0], expected[0])
    found = model(ids)[0]
    assert found.shape == expected[0].shape
    assert relative_error(found, expected[0]) > 0.003, "the window changes something"
    assert relative_error(model(ids, use_cache=False)[0], found) < TOLERANCE
    if head == "ForSequenceClassification":
        padded, mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1), torch.ones(2, 65, dtype=torch.long)
        mask[:, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        assert relative_error(model(padded, attention_mask=mask, position_ids=positions)[0], found) < TOLERANCE
    ahn.detach(model)
    assert torch.equal(model(ids)[0], expected[0])
