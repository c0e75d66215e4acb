"""Ways of use, each tried on one model of each family: right by a reference, or refused with one sentence.

A use is a function that raises AssertionError where a number is wrong, and lets the refusal of what cannot work pass.
With `tests` and `tests/decode` in PYTHONPATH, `python -m support.uses` prints the table for docs/compatibility.md, and
`tests/model/test_uses.py` compares each cell with it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from captured import on_this_machine
from golden import relative_error
from models import awaken, positions, tokens
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel

import ahn
from ahn import AHNCache
from ahn.cache import rows
from ahn.wrappers import decoder_of
from support import architectures, sighted
from support.architectures import TOLERANCE, in_float64, read

WINDOW, SINKS, LENGTH = 9, 2, 34
CHUNK = 8
Answer = str | None
"""What a use says of itself besides that it is right, or None."""
Use = Callable[["Subject"], Answer]
USES: dict[str, Use] = {}
"""By what the page calls them."""
NONE = "–"
"""Where there is no such use."""
FAMILIES: dict[str, str] = {
    "llama": "dense",
    "gemma2": "some layers slide, soft cap",
    "gemma3_text": "some layers slide",
    "gpt_oss": "experts, learned sinks, some layers slide",
    "qwen3_moe": "experts",
    "qwen3_next": "recurrent layers, experts",
    "qwen3_5_text": "recurrent layers",
    "falcon_h1": "recurrence beside attention",
    "nemotron_h": "recurrent layers, layers without a cache",
    "bamba": "recurrent layers, counts positions anew",
    "qwen2_5_vl": "sees images",
    "gemma3": "sees images, whose parts see each other",
    "deepseek_v3": "latent attention",
}
"""Model types, each for what is special about it."""
SIGHTED: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Any]]]] = {
    "qwen2_5_vl": (sighted.seeing, sighted.prompt),
    "gemma3": (lambda: sighted.gemma("gemma3"), lambda: sighted.pictured("gemma3")),
}
"""How to build what sees, and a prompt with images."""


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What LoRA is put on: PEFT refuses some projections of recurrent layers."""


class DoesNotApply(Exception):  # noqa: N818 (no error: the page has a dash there)
    """There is no such use in this family."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A family, of which a use makes models, and a folder to write to."""

    model_type: str
    folder: Path

    def plain(self, seed: int = 0) -> PreTrainedModel:
        """A base: float32, CPU, evaluation mode."""
        if self.model_type in SIGHTED:
            return SIGHTED[self.model_type][0]()
        return architectures.build(self.model_type, seed)

    def model(self, plain: PreTrainedModel | None = None, **config: Any) -> PreTrainedModel:
        """One with a memory whose every part is at work."""
        return awaken(ahn.attach(self.plain() if plain is None else plain, self.config(**config)))

    def config(self, **changes: Any) -> ahn.AHNConfig:
        return ahn.AHNConfig(**{"window": WINDOW, "sinks": SINKS, "prefill_chunk_size": CHUNK} | changes)

    def with_head(self, auto: str) -> PreTrainedModel:
        """A base with another head than one for the next token."""
        config = self.plain().config
        if type(config) not in getattr(transformers, auto)._model_mapping:
            raise DoesNotApply
        torch.manual_seed(0)
        return getattr(transformers, auto).from_config(config).eval()


def use(name: str) -> Callable[[Use], Use]:
    """Enter a function under what the page calls it."""

    def enter(function: Use) -> Use:
        USES[name] = function
        return function

    return enter


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (B, L, V) of a text that is read at once and without a cache: what everything else is compared with."""
    return model(ids, use_cache=False).logits


def same(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    error = relative_error(found, expected)
    assert error < tolerance, f"off by {error:.1e}"


def continued(model: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
    """A text with the likeliest tokens after it, each by a forward over all that is before it."""
    for _ in range(new):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
def generated(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=new, **{"do_sample": False} | options)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the memory, by name; they are taken off."""
    found = {name: p.grad.clone() for name, p in ahn.adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    assert any(name.endswith("o_proj.weight") for name in found)
    return found


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        same(found[name], x, 1e-3)  # sums over all tokens, of terms that cancel


# -- reading and writing -----------------------------------------------------------------------------------------------


@use("`generate`, greedy")
def greedy(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, 20)
    assert torch.equal(generated(model, ids, 6), continued(model, ids, 6))
    return None


@use("`generate`, beams")
def beams(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(2, 20)
    options = {"num_beams": 3}
    assert torch.equal(generated(model, ids, 5, **options), generated(model, ids, 5, use_cache=False, **options))
    return None


@use("`inputs_embeds`")
def embedded(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    if getattr(decoder_of(model).config, "hidden_size_per_layer_input", None):
        raise DoesNotApply
    x = model.get_input_embeddings()(ids)
    with torch.no_grad():
        same(model(inputs_embeds=x).logits, whole(model, ids))
    return None


@use("`output_hidden_states`")
@torch.no_grad()
def hidden_states(subject: Subject) -> Answer:
    """With a wide window those of the base; with a narrow one the last is what the head is given."""
    model, ids = subject.model(), tokens(1, LENGTH)
    found = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    last = model.get_output_embeddings()(found[-1])
    kept = [generated(model, ids, 2, output_hidden_states=True, return_dict_in_generate=True).hidden_states[0]]
    same(kept[0][-1], found[-1])
    assert torch.equal(last.argmax(-1), whole(model, ids).argmax(-1))  # some cap or scale logits afterwards
    ahn.set_window(model, 60, SINKS)
    for x, expected in zip(
        model(ids, output_hidden_states=True).hidden_states,
        subject.plain()(ids, output_hidden_states=True).hidden_states,
        strict=True,
    ):
        assert torch.equal(x, expected)
    return None


@use("`set_attn_implementation('eager')`")
def another_kernel(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    expected = whole(model, ids)
    model.set_attn_implementation("eager")
    same(whole(model, ids), expected)
    same(read(model, ids, [20, *[1] * 14]), expected)
    return None


@use("`cache_implementation='static'`")
def static_cache(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, 20)
    with pytest.warns(UserWarning, match="is ignored"):
        found = generated(model, ids, 4, cache_implementation="static")
    assert torch.equal(found, continued(model, ids, 4))
    return "it is ignored, with a warning"


@use("images in the prompt")
@torch.no_grad()
def images(subject: Subject) -> Answer:
    if subject.model_type not in SIGHTED:
        raise DoesNotApply
    model, given = subject.model(), SIGHTED[subject.model_type][1]()
    same(model(**given).logits, model(**given, use_cache=False).logits)
    ahn.set_window(model, 100, SINKS)
    assert torch.equal(model(**given).logits, subject.plain()(**given).logits)
    return None


# -- masks -------------------------------------------------------------------------------------------------------------


@use("padding on the left")
def left_padding(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = generated(model, ids, 5, attention_mask=mask)
    assert torch.equal(found[:1, 7:], continued(model, ids[:1, 7:], 5))
    assert torch.equal(found[1:], continued(model, ids[1:], 5))
    return None


@use("padding on the right")
@torch.no_grad()
def right_padding(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 21:] = 0
    for cached in (True, False):
        logits = model(ids, attention_mask=mask, use_cache=cached).logits
        same(logits[:1, :21], whole(model, ids[:1, :21]))
        same(logits[1:], whole(model, ids[1:]))
    return None


@use("padding on the right, then more tokens")
@torch.no_grad()
def after_right_padding(subject: Subject) -> Answer:
    """While nothing leaves the window, with the positions that `generate` gives."""
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, 8:12] = 0

    def going_on(model: PreTrainedModel, cache: Any) -> Tensor:
        at, logits = positions(mask), []
        for new in (slice(0, 12), slice(12, 13), slice(13, 16)):
            given = {"attention_mask": mask[:, : new.stop], "position_ids": at[:, new], "past_key_values": cache}
            logits.append(model(ids[:, new], **given).logits)
        return torch.cat(logits, dim=1)

    model, plain = subject.model(window=30), subject.plain()
    found = going_on(model, AHNCache.for_model(model))
    same(found[1:], whole(model, ids[1:]))
    return _as_base(found, going_on(plain, DynamicCache(config=plain.config)), mask, whole(model, ids[:1, mask[0] > 0]))


@use("padding amid a text")
@torch.no_grad()
def hole(subject: Subject) -> Answer:
    """While nothing leaves the window."""
    model, ids = subject.model(window=60), tokens(1, 20)
    mask = torch.ones_like(ids)
    mask[0, 6:9] = 0
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    found, base = model(ids, **given).logits, subject.plain()(ids, **given).logits
    return _as_base(found, base, mask, whole(model, ids[:, mask[0] > 0]))


def _as_base(found: Tensor, base: Tensor, mask: Tensor, alone: Tensor) -> Answer:
    """The base's own logits, which in the first row are those of its text alone, or not."""
    real = mask[0] > 0
    assert torch.equal(found[:1, real], base[:1, real])
    return (
        None
        if relative_error(found[:1, real], alone) < TOLERANCE
        else "as the base, whose sliding layers count padding as tokens"
    )


# -- documents, training -----------------------------------------------------------------------------------------------


def packed(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@use("packed sequences")
def packing(subject: Subject) -> Answer:
    lengths = (20, 5, 7, 12)
    model, ids = subject.model(), tokens(1, sum(lengths))
    parts = ids.split(lengths, dim=1)
    expected = torch.cat([whole(model, part) for part in parts], dim=1)
    with torch.no_grad():
        same(model(ids, position_ids=packed(lengths), use_cache=False).logits, expected)
    return None


@use("packed sequences in training")
def packed_training(subject: Subject) -> Answer:
    lengths = (20, 5, 7, 12)
    model, ids = subject.model(), tokens(1, sum(lengths))
    parts = ids.split(lengths, dim=1)
    alone = sum(model(part, labels=part, use_cache=False).loss * (part.shape[1] - 1) for part in parts)
    alone.backward()
    expected = gradients(model)
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": part[0].tolist()} for part in parts])
    count = sum(lengths) - len(lengths)
    together = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(count)).loss * count
    together.backward()
    same(together, alone)
    alike(gradients(model), expected)
    return None


@use("training")
def training(subject: Subject) -> Answer:
    """The gradient says how the loss changes along it, by central differences."""
    model, ids = in_float64(subject.model()), tokens(2, LENGTH)

    def loss() -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1].double()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    weights, found = ahn.adapter_parameters(model), gradients(model)
    size = sum(float((x**2).sum()) for x in found.values()) ** 0.5

    @torch.no_grad()
    def after(step: float) -> float:
        for name, x in found.items():
            weights[name] += step / size * x
        return float(loss())

    step = 1e-3  # some models give logits in float32, whose last bit is 1e-7 of the loss
    slope = (after(step) - after(-2 * step)) / (2 * step)
    assert abs(slope / size - 1) < 0.01, f"a slope of {slope:.3e}, gradients of {size:.3e}"
    return None


@use("gradient checkpointing")
def checkpointing(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(2, LENGTH)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    alike(gradients(model), expected)
    return None


# -- other heads, what is around a model -------------------------------------------------------------------------------


def hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The last hidden states (B, L, D) of a model with a head for the next token."""
    with torch.no_grad():
        return model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]


@use("heads for classes and tokens")
@torch.no_grad()
def heads(subject: Subject) -> Answer:
    """The head is given what the model with a head for the next token has at the same place."""
    ids, found = tokens(2, LENGTH), 0
    for auto in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
        try:
            headed = subject.with_head(auto)
        except DoesNotApply:
            continue
        found += 1
        ahn.attach(headed, subject.config())
        model = subject.model()
        missing = decoder_of(headed).load_state_dict(decoder_of(model).state_dict())
        assert not missing.missing_keys
        states = hidden(model, ids)
        head = headed.score if hasattr(headed, "score") else headed.classifier
        same(headed(ids).logits, head(states[:, -1] if "Sequence" in auto else states))
    if not found:
        raise DoesNotApply
    return None


@use("`AutoModel`")
@torch.no_grad()
def bare(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    torch.manual_seed(0)
    decoder = ahn.attach(AutoModel.from_config(subject.plain().config).eval(), subject.config())
    decoder_of(decoder).load_state_dict(decoder_of(model).state_dict())
    expected = hidden(model, ids)
    same(decoder(ids, use_cache=False).last_hidden_state, expected)
    cache = AHNCache.for_model(decoder)
    states = [decoder(x, past_key_values=cache).last_hidden_state for x in ids.split([20, 5, 1, 8], dim=1)]
    same(torch.cat(states, dim=1), expected)
    return None


@use("LoRA")
def lora(subject: Subject) -> Answer:
    """Before `attach` and after: the base whose weights LoRA has changed, with the memory."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=LINEAR, exclude_modules=r".*\.ahn\..*", init_lora_weights=False)
    ids = tokens(1, LENGTH)
    for first in ("memory", "lora"):
        torch.manual_seed(0)
        if first == "memory":
            wrapped = peft.get_peft_model(subject.model(), config)
        else:
            wrapped = subject.model(peft.get_peft_model(subject.plain(), config))
        expected = whole(wrapped, ids)
        assert relative_error(expected, whole(subject.model(), ids)) > 0.01
        with torch.no_grad():
            same(wrapped(ids).logits, expected)
        merged = wrapped.merge_and_unload()
        same(whole(merged, ids), expected)
        with ahn.disabled(merged):
            base = whole(merged, ids)
        same(whole(ahn.detach(merged), ids), base)
    return None


@use("offload to the CPU or to disk")
def offload(subject: Subject) -> Answer:
    accelerate = pytest.importorskip("accelerate")
    ids, expected = tokens(1, LENGTH), whole(subject.model(), tokens(1, LENGTH))
    ahn.save_adapter(subject.model(), subject.folder / "adapter")
    cpu = torch.device("cpu")
    for place in ("cpu", "disk"):
        for first in ("memory", "offload"):
            model = subject.model() if first == "memory" else subject.plain()
            if place == "cpu":
                accelerate.cpu_offload(model, execution_device=cpu)
            else:
                accelerate.disk_offload(model, subject.folder / first, execution_device=cpu)
            if first == "offload":
                ahn.load_adapter(model, subject.folder / "adapter")
            assert torch.equal(whole(model, ids), expected)
            same(read(model, ids, [20, *[1] * 14]), expected)
    return None


@use("`torch.compile(model)`")
def compiled(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    expected = whole(model, ids)
    torch._dynamo.reset()
    same(whole(torch.compile(model, backend="eager"), ids), expected)
    torch._dynamo.reset()
    return None


@use("several threads")
def threads(subject: Subject) -> Answer:
    """Two conversations, and the base beside them."""
    model, texts = subject.model(), (tokens(1, LENGTH), tokens(1, LENGTH, seed=1))
    expected, base = [whole(model, ids) for ids in texts], whole(subject.plain(), texts[0])

    def talk(place: int) -> Tensor:
        return read(model, texts[place], [20, *[1] * 14])

    def without(_: int) -> Tensor:
        with torch.no_grad(), ahn.disabled(model):
            return model(texts[0], use_cache=False).logits

    with ThreadPoolExecutor(3) as pool:
        talks, plains = [pool.submit(talk, place) for place in (0, 1, 0, 1)], [pool.submit(without, 0)]
    for place, found in enumerate(talks):
        same(found.result(), expected[place % 2])
    assert torch.equal(plains[0].result(), base)
    return None


@use("`ahn.inspect`")
@torch.no_grad()
def inspected(subject: Subject) -> Answer:
    """Every written token is seen, nothing changes; without the memory it is sinks and window."""
    model, ids = subject.model(), tokens(1, LENGTH)
    expected = whole(model, ids)
    with ahn.inspect.record(model) as trace:
        same(read(model, ids, [20, *[1] * 14]), expected)
    written = next(iter(trace.writes.values())).positions[0]
    assert written.tolist() == list(range(SINKS, LENGTH - WINDOW))
    with ahn.inspect.without(model):
        found = whole(model, ids)
    same(found, whole(ahn.attach(subject.plain(), subject.config()), ids))
    return None


# -- files and copies --------------------------------------------------------------------------------------------------


@use("`copy.deepcopy`, `torch.save`")
def copied(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    expected, other = whole(model, ids), copy.deepcopy(model)
    torch.save(model, subject.folder / "model")
    awaken(model)  # the copies have weights of their own
    loaded = torch.load(subject.folder / "model", weights_only=False)
    for each in (other, loaded):
        assert torch.equal(whole(each, ids), expected)
    return None


@use("`save_pretrained`, then an Auto class")
def saved(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    model.save_pretrained(subject.folder)
    auto = transformers.AutoModelForImageTextToText if subject.model_type in SIGHTED else None
    auto = auto or transformers.AutoModelForCausalLM
    for each in (ahn.from_pretrained(subject.folder), auto.from_pretrained(subject.folder)):
        assert torch.equal(whole(each.eval(), ids), whole(model, ids))
    return None


@use("`save_adapter`, then `load_adapter`")
def adapter(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    ahn.save_adapter(model, subject.folder)
    assert torch.equal(whole(ahn.load_adapter(subject.plain(), subject.folder), ids), whole(model, ids))
    return None


@use("saved and copied conversations")
def conversations(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    cache = AHNCache.for_model(model)
    read(model, ids[:, :21], [21], cache)
    cache.to("cpu").save(subject.folder / "conversation")
    for each in (AHNCache.load(subject.folder / "conversation", model), copy.deepcopy(cache), cache):
        same(read(model, ids[:, 21:], [1, 5, 1, 6], each), whole(model, ids)[:, 21:])
    return None


@use("conversations joined in a batch")
@torch.no_grad()
def joined(subject: Subject) -> Answer:
    model, lengths = subject.model(), (24, 15, 5)
    texts = [tokens(1, length + 4, seed=length) for length in lengths]
    caches = [AHNCache.for_model(model) for _ in lengths]
    for ids, length, cache in zip(texts, lengths, caches, strict=True):
        read(model, ids[:, :length], [length], cache)
    batch = rows.join(caches)
    for place in range(4):
        new = torch.cat([ids[:, length + place, None] for ids, length in zip(texts, lengths, strict=True)])
        at = torch.tensor(rows.lengths(batch))[:, None]
        logits = model(new, attention_mask=rows.mask(batch), position_ids=at, past_key_values=batch).logits
    for row, ids in enumerate(texts):
        same(logits[row], whole(model, ids)[0, -1:])
    return None


@use("taking tokens out again (`cache.crop`)")
def cropped(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, LENGTH)
    cache = AHNCache.for_model(model)
    read(model, ids[:, :5], [5], cache)
    read(model, tokens(1, 3, seed=1), [3], cache)
    cache.crop(-3)
    same(read(model, ids[:, 5:], [20, 9], cache), whole(model, ids)[:, 5:])
    return None


# -- speed -------------------------------------------------------------------------------------------------------------


@use("prompt lookup")
def lookup(subject: Subject) -> Answer:
    model, ids = subject.model(), tokens(1, 6).repeat(1, 4)
    assert torch.equal(generated(model, ids, 8, prompt_lookup_num_tokens=3), continued(model, ids, 8))
    return None


@use("assistant model")
def assistant(subject: Subject) -> Answer:
    model, ids, other = subject.model(), tokens(1, 20), subject.plain(seed=1)
    assert torch.equal(generated(model, ids, 8, assistant_model=other), continued(model, ids, 8))
    return None


@use("captured steps")
def captured(subject: Subject) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        graphs = on_this_machine(patch)
        model, ids = subject.model(), tokens(1, 20)
        assert torch.equal(generated(model, ids, 8), continued(model, ids, 8))
    return None if graphs.replays else "steps take the ordinary way, none is captured"


@use("quantized tokens")
def quantized(subject: Subject) -> Answer:
    """In float64: a number on the edge of two codes falls to either side."""
    model, ids = in_float64(subject.model(quantized=8)), tokens(1, LENGTH)
    expected = whole(model, ids)
    assert relative_error(expected, whole(in_float64(subject.model()), ids)) > 0.003
    same(read(model, ids, [20, *[1] * 14]), expected)
    with torch.no_grad():
        same(model(ids).logits, expected)
    return None


@use("a memory of tokens")
def retained(subject: Subject) -> Answer:
    """That keeps every token exactly: the base."""
    model, ids = subject.model(memory="retained", slots=64, key_bits=16, value_bits=16), tokens(1, LENGTH)
    with torch.no_grad():
        same(model(ids).logits, whole(subject.plain(), ids))
    same(read(model, ids, [20, *[1] * 14]), whole(subject.plain(), ids))
    return None


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one use of one family: "right", perhaps with a remark, "refused" with the sentence, "–" or "wrong"."""

    kind: str
    note: str = ""


def judge(name: str, model_type: str, folder: Path) -> Verdict:
    """What becomes of one use of one family."""
    torch.manual_seed(0)
    try:
        return Verdict("right", USES[name](Subject(model_type, folder)) or "")
    except DoesNotApply:
        return Verdict(NONE)
    except ahn.AHNError as error:
        return Verdict("refused", str(error))
    except AssertionError as error:
        return Verdict("wrong", str(error).split("\n")[0])
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}".split("\n")[0])


def table(found: dict[tuple[str, str], Verdict]) -> str:
    """For docs/compatibility.md: uses by families, and below them the notes."""
    notes = list(dict.fromkeys(verdict.note for verdict in found.values() if verdict.note))

    def cell(verdict: Verdict) -> str:
        return f"{verdict.kind} ({notes.index(verdict.note) + 1})" if verdict.note else verdict.kind

    lines = [
        "| use | " + " | ".join(f"`{model_type}`" for model_type in FAMILIES) + " |",
        "|---" * (len(FAMILIES) + 1) + "|",
        "| what is special | " + " | ".join(FAMILIES.values()) + " |",
        *(f"| {name} | " + " | ".join(cell(found[name, family]) for family in FAMILIES) + " |" for name in USES),
        "",
        *(f"{number}. {note}" for number, note in enumerate(notes, start=1)),
    ]
    return "\n".join(lines)


def read_table(page: str) -> dict[tuple[str, str], Verdict]:
    """The inverse of `table`, of a page that has it."""
    header = re.search(r"^\| use \| (.+) \|$", page, flags=re.M)
    assert header is not None
    part = page[header.start() :].split("\n## ")[0]
    families = [name.strip("`") for name in header[1].split(" | ")]
    notes = dict(re.findall(r"^(\d+)\. (.+)$", part, flags=re.M))
    found = {}
    for name, cells in re.findall(r"^\| (.+?) \| (.+) \|$", part, flags=re.M)[2:]:
        for family, cell in zip(families, cells.split(" | "), strict=True):
            kind, _, number = cell.partition(" ")
            found[name, family] = Verdict(kind, notes[number.strip("()")] if number else "")
    return found


def _every_cell() -> Iterator[tuple[tuple[str, str], Verdict]]:
    for name, family in itertools.product(USES, FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            yield (name, family), judge(name, family, Path(folder))


if __name__ == "__main__":
    print(table(dict(_every_cell())))
