"""The state of a conversation is its cache, which can be copied, reordered, moved, saved and cropped.

This is invariant 4 of docs/spec.md, section 8.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import relative_error
from models import ARCHITECTURES, EVERYTHING, MEMORIES, RECURRENT, adapted, awaken, base, positions, tokens
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import ahn
from ahn import AHNCache, AHNError
from ahn.model import chunks

WINDOW, SINKS = 9, 2
LOSSLESS = WINDOW + SINKS
TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention
LENGTHS = [5, LOSSLESS, 30]  # before anything has left, at the edge, after


def student(architecture: str = "qwen3", **config: Any) -> PreTrainedModel:
    return adapted(architecture, **{"window": WINDOW, "sinks": SINKS} | config)


@torch.no_grad()
def start(model: PreTrainedModel, ids: Tensor, **options: Any) -> AHNCache:
    """A cache that has read ids (B, L), ending in single steps so that the window has gone round."""
    cache = AHNCache.for_model(model)
    model(ids[:, :-3], past_key_values=cache, **options)
    for t in range(ids.shape[1] - 3, ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model: PreTrainedModel, cache: AHNCache, batch: int, seed: int = 9) -> Tensor:
    """Logits of some more steps and a chunk."""
    ids = tokens(batch, 9, seed=seed)
    logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4)]
    return torch.cat([*logits, model(ids[:, 4:], past_key_values=cache).logits], dim=1)


# -- generate ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("memory", MEMORIES)
def test_greedy_is_what_whole_forwards_choose(memory: str) -> None:
    model, ids = student(memory=memory), tokens(2, 20)
    found = model.generate(ids, max_new_tokens=15, do_sample=False)
    with torch.no_grad():
        for _ in range(15):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


@pytest.mark.sample(3)
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("length", LENGTHS)
def test_beam_search_is_what_it_is_without_a_cache(memory: str, length: int) -> None:
    """Beams are reordered every step; with no cache every step reads everything again."""
    model, ids = student(memory=memory), tokens(2, length)
    options: dict[str, Any] = {
        "num_beams": 3, "max_new_tokens": 14, "do_sample": False, "num_return_sequences": 3,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=TOLERANCE, atol=0)
    assert bool((with_cache.beam_indices[:, 1:12] != with_cache.beam_indices[:, :11]).any()), "no beam was reordered"


def test_beam_search_below_the_window_is_the_base_models() -> None:
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(
        student(window=60).generate(tokens(2, 20), **options), base("qwen3").generate(tokens(2, 20), **options)
    )


def test_sampled_sequences_share_a_prompt() -> None:
    model, ids = student(), tokens(2, 20)
    options: dict[str, Any] = {
        "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "top_k": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    out = model.generate(ids, **options)
    assert out.sequences.shape == (6, 32) and len({tuple(row) for row in out.sequences[:3].tolist()}) == 3
    with torch.no_grad():
        logits = model(out.sequences, use_cache=False).logits[:, 19:-1]
    assert relative_error(torch.stack(out.logits, dim=1), logits) < TOLERANCE


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_batch_generates_what_its_rows_do(architecture: str) -> None:
    model = student(architecture, prefill_chunk_size=4)
    ids, mask = tokens(2, 25), torch.ones(2, 25, dtype=torch.long)
    ids[1, :9] = 0
    mask[1, :9] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together[:1], model.generate(ids[:1], **options))
    assert torch.equal(together[1:, 9:], model.generate(ids[1:, 9:], **options))


@pytest.mark.sample(4)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("window", [WINDOW, 200])
def test_a_second_turn_through_generate(architecture: str, window: int) -> None:
    """The whole history, or only the new tokens with a mask over everything: what a fresh cache gives."""
    model = student(architecture, window=window, prefill_chunk_size=7)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    cache = AHNCache.for_model(model)
    first = model.generate(tokens(1, 20), past_key_values=cache, **options)
    assert cache.seen == first.shape[1] - 1  # the last token was chosen, not read
    history = torch.cat([first, tokens(1, 15, seed=3)], dim=1)
    expected = model.generate(history, **options)
    assert torch.equal(model.generate(history, past_key_values=copy.deepcopy(cache), **options), expected)
    new = history[:, cache.seen :]
    answer = model.generate(new, attention_mask=torch.ones_like(history), past_key_values=cache, **options)
    assert torch.equal(answer[:, new.shape[1] :], expected[:, history.shape[1] :])


@pytest.mark.parametrize("window", [WINDOW, 200])
def test_a_second_turn_of_a_padded_batch_through_generate(window: int) -> None:
    model = student(window=window, prefill_chunk_size=7)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    cache = AHNCache.for_model(model)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    new, new_mask = tokens(2, 11, seed=3), torch.ones(2, 11, dtype=torch.long)
    new[1, :6], new_mask[1, :6] = 0, 0
    history = torch.cat([first, new], dim=1)
    everything = torch.cat([mask, torch.ones(2, 6, dtype=torch.long), new_mask], dim=1)
    together = model.generate(history, attention_mask=everything, past_key_values=cache, **options)
    for row in range(2):
        own = history[row][everything[row].bool()][None]
        assert torch.equal(together[row, history.shape[1] :], model.generate(own, **options)[0, own.shape[1] :])


def test_new_tokens_alone_need_a_mask() -> None:
    model = student()
    cache = start(model, tokens(1, 20))
    with pytest.raises(AHNError, match=r"has read 20 tokens, the input has 6.*20 \+ 6"):
        model.generate(tokens(1, 6), past_key_values=cache, max_new_tokens=2)


def test_generate_makes_its_own_cache_unless_told_otherwise() -> None:
    model, ids = student(), tokens(1, 20)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    assert isinstance(model.generate(ids, **options).past_key_values, AHNCache)
    assert model.generate(ids, use_cache=False, **options).past_key_values is None
    model.generation_config.use_cache = False
    assert model.generate(ids, **options).past_key_values is None


@pytest.mark.parametrize("attribute", ["inputs_embeds", "input_ids"])
def test_a_prompt_of_embeddings(attribute: str) -> None:
    model, ids = student(prefill_chunk_size=7), tokens(2, 30)
    given = {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids).detach()}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)[:, 30:]
    assert torch.equal(model.generate(**{attribute: given[attribute]}, **options)[:, -8:], expected)
    with torch.no_grad():
        found = model(**{attribute: given[attribute]}).logits
        assert relative_error(found, model(ids, use_cache=False).logits) < TOLERANCE


# -- many conversations, copies, batches -------------------------------------------------------------------------------


def test_conversations_take_turns_on_one_model() -> None:
    model = student()
    alone = [go_on(model, start(model, tokens(1, 30, seed=i)), 1, seed=i + 50) for i in range(3)]
    caches = [start(model, tokens(1, 30, seed=i)) for i in range(3)]
    found: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for t in (0, 1, 2, 3):
            for i, cache in enumerate(caches):
                found[i].append(model(tokens(1, 9, seed=i + 50)[:, t : t + 1], past_key_values=cache).logits)
        for i, cache in enumerate(caches):
            found[i].append(model(tokens(1, 9, seed=i + 50)[:, 4:], past_key_values=cache).logits)
    assert all(torch.equal(torch.cat(found[i], dim=1), alone[i]) for i in range(3))


@pytest.mark.sample(4)
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_copy_is_a_fork(memory: str, length: int) -> None:
    model = student(memory=memory)
    cache = start(model, tokens(2, length))
    fork = copy.deepcopy(cache)
    other = go_on(model, fork, 2, seed=1)
    expected = go_on(model, copy.deepcopy(cache), 2)
    assert torch.equal(go_on(model, cache, 2), expected) and not torch.equal(other, expected)
    assert fork.seen == cache.seen == length + 9


@torch.no_grad()
def test_a_cache_is_pickled_without_its_model() -> None:
    model, file = student(), io.BytesIO()
    cache = start(model, tokens(2, 30))
    torch.save(cache, file)
    assert len(file.getvalue()) < 20 * cache.nbytes()
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert found.model is None
    assert torch.equal(go_on(model, found, 2), go_on(model, cache, 2))


CHANGES: dict[str, tuple[Callable[[AHNCache], object], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.sample(9)
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_rows_of_a_padded_batch_move(memory: str, length: int, change: str) -> None:
    """Afterwards the cache is one that has read the rows in their new places, padding included."""
    model = student(memory=memory)
    call, rows = CHANGES[change]
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
    mask[0, :2], mask[2, :4] = 0, 0

    def feed(batch: Tensor, real: Tensor) -> AHNCache:
        cache = AHNCache.for_model(model)
        model(batch, attention_mask=real, position_ids=positions(real), past_key_values=cache)
        return cache

    def steps(cache: AHNCache, real: Tensor) -> Tensor:
        new, logits = tokens(1, 6, seed=4).expand(len(real), -1), []
        for t in range(6):
            real = torch.cat([real, torch.ones(len(real), 1, dtype=torch.long)], dim=1)
            extra = {"attention_mask": real, "position_ids": positions(real)[:, -1:]}
            logits.append(model(new[:, t : t + 1], past_key_values=cache, **extra).logits)
        return torch.cat(logits, dim=1)

    cache = feed(ids, mask)
    call(cache)
    assert relative_error(steps(cache, mask[rows]), steps(feed(ids[rows], mask[rows]), mask[rows])) < TOLERANCE


@torch.no_grad()
def test_a_cache_moves() -> None:
    model = student()
    cache = start(model, tokens(2, 30))
    expected = go_on(model, copy.deepcopy(cache), 2)
    assert cache.to("cpu") is cache
    for layer in cache.memory_layers.values():  # the device comes back by itself before its turn
        layer.offload()
        layer.prefetch()
    assert torch.equal(go_on(model, cache, 2), expected)
    meta = copy.deepcopy(cache).to("meta")
    assert {x.device.type for layer in meta.memory_layers.values() for x in layer.tensors().values()} == {"meta"}
    assert meta.nbytes() == cache.nbytes() > 0


@pytest.mark.parametrize("layers", [(), (0,)])
def test_reset_is_a_new_cache(layers: tuple[int, ...]) -> None:
    model = student(full_attention_layers=layers)
    cache = start(model, tokens(2, 30))
    cache.reset()
    assert cache.seen == cache.nbytes() == 0
    expected = go_on(model, AHNCache.for_model(model), 3)
    assert torch.equal(go_on(model, cache, 3), expected)


# -- crop --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@torch.no_grad()
def test_crop_before_anything_has_left(architecture: str) -> None:
    model, ids = student(architecture), tokens(2, 5)
    cache, expected = AHNCache.for_model(model), AHNCache.for_model(model)
    model(ids, past_key_values=cache)
    cache.crop(-2)
    model(ids[:, :3], past_key_values=expected)
    assert cache.seen == cache.get_seq_length() == 3
    assert relative_error(go_on(model, cache, 2), go_on(model, expected, 2)) < TOLERANCE


@torch.no_grad()
def test_crop_takes_padding_with_it() -> None:
    model = student()
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = AHNCache.for_model(model)
    model(tokens(2, 6), attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    cache.crop(-4)
    again, real = tokens(2, 14, seed=3), torch.cat([mask[:, :2], torch.ones(2, 14, dtype=torch.long)], dim=1)
    extra = {"attention_mask": real, "position_ids": positions(real)[:, 2:]}
    found = model(again, past_key_values=cache, **extra).logits
    assert relative_error(found[0], model(again[:1], use_cache=False).logits[0]) < TOLERANCE


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_oss"])
@torch.no_grad()
def test_crop_past_an_eviction_raises_and_changes_nothing(architecture: str) -> None:
    model = student(architecture, full_attention_layers=(1,) if architecture == "qwen3" else ())
    cache = start(model, tokens(1, 30))
    expected = go_on(model, copy.deepcopy(cache), 1)
    with pytest.raises(AHNError, match=f"{30 - LOSSLESS} of them left the window into the memory"):
        cache.crop(-1)
    with pytest.raises(AHNError, match="negative number of tokens to remove, got 4"):
        cache.crop(4)
    assert torch.equal(go_on(model, cache, 1), expected)


# -- save and load -----------------------------------------------------------------------------------------------------


@pytest.mark.sample(8)
@pytest.mark.parametrize("memory", EVERYTHING)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_saved_conversation_goes_on_bit_for_bit(memory: str, length: int, tmp_path: Path) -> None:
    model = student(memory=memory, router=True, full_attention_layers=(0,) if length == 30 else ())
    cache = start(model, tokens(2, length))
    cache.save(tmp_path / "book" / "cache.safetensors")
    assert [path.name for path in (tmp_path / "book").iterdir()] == ["cache.safetensors"]
    ahn.set_window(model, 77, 5)  # window and sinks are the conversation's
    loaded = AHNCache.load(tmp_path / "book" / "cache.safetensors", model)
    assert loaded.seen == length and (loaded.config.window, loaded.config.sinks) == (WINDOW, SINKS)
    assert torch.equal(go_on(model, loaded, 2), go_on(model, cache, 2))


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_oss"])
def test_a_model_with_sliding_layers_is_saved_too(architecture: str, tmp_path: Path) -> None:
    model = student(architecture)
    cache = start(model, tokens(1, 30))
    cache.save(tmp_path / "cache")
    loaded = AHNCache.load(tmp_path / "cache", model)
    assert torch.equal(go_on(model, loaded, 1), go_on(model, cache, 1))


@torch.no_grad()
def test_padding_is_saved_too(tmp_path: Path) -> None:
    model = student()
    mask = torch.tensor([[0] * 6 + [1] * 14, [1] * 20])
    caches = [AHNCache.for_model(model)]
    model(tokens(2, 20), attention_mask=mask, position_ids=positions(mask), past_key_values=caches[0])
    caches[0].save(tmp_path / "cache")
    caches.append(AHNCache.load(tmp_path / "cache", model))
    real = torch.cat([mask, torch.tensor([[1] * 8, [0] * 3 + [1] * 5])], dim=1)
    extra = {"attention_mask": real, "position_ids": positions(real)[:, 20:]}
    a, b = (model(tokens(2, 8, seed=1), past_key_values=cache, **extra).logits for cache in caches)
    assert torch.equal(a, b)
    with pytest.raises(AHNError, match="holds 2 sequences"):
        AHNCache.load(tmp_path / "cache", model).begin(3, 1, None, torch.device("cpu"))


class TestFaults:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
        model = student()
        start(model, tokens(1, 30)).save(tmp_path / "cache")
        return model, tmp_path / "cache"

    def test_missing(self, saved: tuple[PreTrainedModel, Path]) -> None:
        with pytest.raises(AHNError, match="no cache file"):
            AHNCache.load(saved[1].with_name("other"), saved[0])

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, saved: tuple[PreTrainedModel, Path], share: float) -> None:
        model, path = saved
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(AHNError, match="damaged"):
            AHNCache.load(path, model)

    def test_a_directory(self, saved: tuple[PreTrainedModel, Path]) -> None:
        with pytest.raises(AHNError):
            AHNCache.load(saved[1].parent, saved[0])

    def test_not_a_cache(self, saved: tuple[PreTrainedModel, Path]) -> None:
        model, path = saved
        save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(AHNError, match="not a conversation"):
            AHNCache.load(path, model)
        save_file({"x": torch.zeros(2)}, path, metadata={"ahn": json.dumps({"format": "ahn-cache-99"})})
        with pytest.raises(AHNError, match="not a conversation"):
            AHNCache.load(path, model)

    def test_another_base_model(self, saved: tuple[PreTrainedModel, Path]) -> None:
        with pytest.raises(AHNError, match="another base model or adapter"):
            AHNCache.load(saved[1], student(seed=1))

    def test_other_adapter_weights(self, saved: tuple[PreTrainedModel, Path]) -> None:
        model, path = saved
        with torch.no_grad():
            model.model.layers[1].ahn.fn.b_proj.weight[0, 0] += 1e-3
        with pytest.raises(AHNError, match="another base model or adapter"):
            AHNCache.load(path, model)

    def test_another_memory(self, saved: tuple[PreTrainedModel, Path]) -> None:
        with pytest.raises(AHNError, match="another base model or adapter"):
            AHNCache.load(saved[1], student(memory="mamba2"))

    def test_without_an_adapter(self, saved: tuple[PreTrainedModel, Path]) -> None:
        with pytest.raises(AHNError, match=r"ahn\.attach"):
            AHNCache.load(saved[1], base())

    def test_nothing_to_save(self, saved: tuple[PreTrainedModel, Path]) -> None:
        with pytest.raises(AHNError, match="read nothing yet"):
            AHNCache.for_model(saved[0]).save(saved[1])

    def test_a_failed_save_leaves_the_old_file(
        self, saved: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, path = saved
        old = path.read_bytes()

        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("ahn.files.os.replace", fail)
        with pytest.raises(AHNError, match="disk full"):
            start(model, tokens(1, 12)).save(path)
        assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["cache"]


# -- wrong caches ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_wrong_caches_are_refused() -> None:
    model, ids = student(), tokens(1, 20)
    for wrong in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(AHNError, match=f"needs an AHNCache, got {type(wrong).__name__}"):
            model(ids, past_key_values=wrong)
    with pytest.raises(AHNError, match=r"ahn\.attach"):
        AHNCache.for_model(base())
    cache = start(model, ids)
    expected = go_on(model, copy.deepcopy(cache), 1)
    with pytest.raises(AHNError, match="holds 1 sequences, the input has 2"):
        model(tokens(2, 3), past_key_values=cache)
    with ahn.disabled(model), pytest.raises(AHNError, match="an AHNCache is of no use"):
        model(ids, past_key_values=cache)
    assert torch.equal(go_on(model, copy.deepcopy(cache), 1), expected), "a refusal changes nothing"
    deeper = ahn.attach(base(num_hidden_layers=3), model.ahn_config)
    with pytest.raises(AHNError, match="made for another model or memory"):
        deeper(ids, past_key_values=cache)
    ahn.detach(model)
    with pytest.raises(AHNError, match="adapter enabled"):
        model(ids, past_key_values=cache)
    ahn.attach(model, ahn.AHNConfig(memory="mamba2", window=9, sinks=2))
    with pytest.raises(AHNError, match="made for another model or memory"):
        model(ids, past_key_values=cache)
    for name in (None, 5):
        with pytest.raises(AHNError, match="takes a file as a string or a path"):
            AHNCache.load(name, model)  # type: ignore[arg-type]
        with pytest.raises(AHNError, match="takes a file as a string or a path"):
            start(model, ids).save(name)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_base_cache_inside_disabled() -> None:
    model, ids = student(), tokens(1, 20)
    with ahn.disabled(model):
        cache = model(ids[:, :15]).past_key_values
        assert isinstance(cache, DynamicCache) and not isinstance(cache, AHNCache)
        logits = model(ids[:, 15:], past_key_values=cache).logits
    assert torch.equal(logits, base()(ids[:, 15:], past_key_values=base()(ids[:, :15]).past_key_values).logits)


@pytest.mark.parametrize("where", ["before", "between", "within"])
@torch.no_grad()
def test_a_forward_that_stops_halfway_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a chat: either nothing happened and the cache goes on, or it says so. It is never silently wrong."""
    model = student(full_attention_layers=(0,) if where == "between" else ())
    mask = torch.tensor([[0, 0] + [1] * 28, [1] * 30])
    cache = AHNCache.for_model(model)
    model(tokens(2, 30), attention_mask=mask, past_key_values=cache)
    real = torch.cat([mask, torch.tensor([[1] * 6, [0] * 3 + [1] * 3])], dim=1)

    def forward(cache: AHNCache) -> Tensor:
        return model(tokens(2, 6, seed=1), attention_mask=real, past_key_values=cache).logits

    expected = forward(copy.deepcopy(cache))
    broken = {
        "before": model.model.layers[0].input_layernorm,
        "between": model.model.layers[0].mlp,
        "within": model.model.layers[0].self_attn.o_proj,
    }[where]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = broken.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(cache)
    handle.remove()
    if where == "before":
        assert torch.equal(forward(cache), expected)
    else:
        with pytest.raises(AHNError, match="stopped halfway"):
            forward(cache)
        cache.reset()
        model(tokens(2, 30), attention_mask=mask, past_key_values=cache)
        assert torch.equal(forward(cache), expected)


@torch.no_grad()
def test_a_step_interrupted_inside_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step has overwritten the oldest key when its attention fails."""
    model = student(full_attention_layers=(0,))  # the last layer: all have counted the token
    cache = start(model, tokens(1, 30))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.model.layers[1].ahn.fn), "read_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, 1), past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(AHNError, match="stopped halfway"):
        model(tokens(1, 1), past_key_values=cache)


# -- logits_to_keep and other outputs of a chunked prefill -------------------------------------------------------------


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "keep", [0, 1, 7, 33, 200, [0, 5, 34], [-1], [34, 2, 2, 20], [-1, 0, -35], []], ids=lambda keep: str(keep)
)
@torch.no_grad()
def test_logits_to_keep(keep: int | list[int]) -> None:
    model, ids = student(prefill_chunk_size=8), tokens(2, 35)
    wanted = torch.tensor(keep, dtype=torch.long) if isinstance(keep, list) else keep
    full = model(ids, use_cache=False).logits
    expected = full[:, slice(-wanted, None) if isinstance(keep, int) else wanted]
    out = model(ids, logits_to_keep=wanted)
    assert out.logits.shape == expected.shape
    assert not expected.numel() or relative_error(out.logits, expected) < TOLERANCE
    assert isinstance(out.past_key_values, AHNCache) and out.past_key_values.seen == 35


@torch.no_grad()
def test_of_chunks_that_nobody_asked_about_no_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    join = torch.cat

    def cat(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        held.append(len(parts))
        return join(parts, dim=dim)

    model, ids = student(prefill_chunk_size=8), tokens(1, 60)
    monkeypatch.setattr(chunks, "torch", SimpleNamespace(**vars(torch) | {"cat": cat}))
    model(ids, logits_to_keep=1)
    assert held == [1]


@torch.no_grad()
def test_other_outputs_of_a_long_prompt() -> None:
    """What cannot be put together from chunks is computed at once; labels as well."""
    model, ids = student(prefill_chunk_size=8), tokens(2, 35)
    expected = model(ids, use_cache=False)
    out = model(ids, output_hidden_states=True)
    assert [x.shape[1] for x in out.hidden_states] == [35, 35, 35]
    assert relative_error(out.logits, expected.logits) < TOLERANCE
    assert relative_error(model(ids, return_dict=False)[0], expected.logits) < TOLERANCE
    assert torch.equal(model(ids, labels=ids).loss, model(ids, labels=ids, use_cache=False).loss)
    eager = awaken(ahn.attach(base(attn_implementation="eager"), model.ahn_config))
    attentions = eager(ids, output_attentions=True).attentions
    assert [x.shape for x in attentions] == [(2, 4, 35, 35)] * 2
    visible = torch.ones(35, 35, dtype=torch.bool).tril()
    visible &= (torch.arange(35) < SINKS) | (torch.arange(35)[:, None] - torch.arange(35) < WINDOW)
    assert all(torch.equal(x[0, 0] > 0, visible) for x in attentions)


@torch.no_grad()
def test_a_chunk_holds_logits_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = student(prefill_chunk_size=8), []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    model.generate(tokens(1, 60), max_new_tokens=2)
    assert max(sizes) == 1


@torch.no_grad()
def test_chunks_are_whole_before_and_after_the_window_fills() -> None:
    model, sizes = student(prefill_chunk_size=4), []
    model.get_decoder().layers[0].register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    cache = AHNCache.for_model(model)
    model(tokens(1, 21), past_key_values=cache)  # 11 until the window is full
    assert sizes == [4, 4, 3, 4, 4, 2]
    model(tokens(1, 9), past_key_values=cache)
    assert sizes[6:] == [4, 4, 1]


# -- precision, gradients, pickling ------------------------------------------------------------------------------------


def test_inference_mode_then_no_grad() -> None:
    """A prompt read under inference_mode; the cache is written in place outside of it."""
    model, ids = student(), tokens(1, 30)
    expected = go_on(model, start(model, ids), 1)
    with torch.inference_mode():
        cache = start(model, ids)
    assert torch.equal(go_on(model, cache, 1), expected)


@pytest.mark.sample(3)
@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_bfloat16(memory: str) -> None:
    """The whole model in bfloat16, or a bfloat16 base with a float32 adapter: states are float32, results near."""
    model, ids = student(memory=memory), tokens(2, 40)
    exact = model(ids).logits
    weights = {name: x for name, x in model.state_dict().items() if ".ahn." in name}
    rounding = relative_error(ahn.detach(copy.deepcopy(model)).bfloat16()(ids).logits, base()(ids).logits)
    mixed = ahn.attach(base().bfloat16(), model.ahn_config)
    mixed.load_state_dict(weights, strict=False)
    for found in (mixed, copy.deepcopy(mixed).bfloat16()):
        cache = AHNCache.for_model(found)
        logits = found(ids, past_key_values=cache).logits
        assert logits.dtype == torch.bfloat16
        # The base alone, rounded, is `rounding` off; a memory adds operations of the same kind.
        assert relative_error(logits, exact) < 5 * rounding
        for layer in cache.memory_layers.values():
            assert layer.keys.dtype == torch.bfloat16
            assert memory == "retained" or all(x.dtype == torch.float32 for x in layer.state.memory.values())
            assert all(x.dtype == torch.bfloat16 for x in layer.window.gates.values())
        assert torch.isfinite(go_on(found, cache, 2)).all()


@torch.no_grad()
def test_autocast() -> None:
    model, ids = student(), tokens(2, 40)
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounding = relative_error(base()(ids).logits, base()(ids).logits.float())
        found = model(ids).logits
        steps = start(model, ids)
        assert torch.isfinite(go_on(model, steps, 2)).all()
    with ahn.disabled(model), torch.autocast("cpu", torch.bfloat16):
        teacher = model(ids).logits
    rounding = relative_error(teacher, base()(ids).logits)
    assert relative_error(found, exact) < 5 * rounding


@pytest.mark.sample(4)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("memory", RECURRENT)
def test_gradient_checkpointing(memory: str, use_reentrant: bool) -> None:
    model, ids = student(memory=memory, router=True, q_proj=True).train(), tokens(2, 40)
    ids_mask = torch.ones_like(ids)
    ids_mask[1, :11] = 0
    model.requires_grad_(False)
    parameters = ahn.adapter_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(ids, attention_mask=ids_mask, position_ids=positions(ids_mask), labels=ids)
        out.loss.backward()
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    if use_reentrant:
        model.enable_input_require_grads()
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys() and len(found) > 5
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_training_with_and_without_a_cache_is_the_same() -> None:
    """`use_cache` is on by default, also where gradients are wanted."""
    model, ids = student(router=True), tokens(2, 40)
    found = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, use_cache=use_cache, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(relative_error(found[0][name], x) < 10 * TOLERANCE for name, x in found[1].items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_an_adapted_model_can_be_copied(how: str) -> None:
    model, ids = student(router=True, prefill_chunk_size=6), tokens(1, 40)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    expected = model(ids).logits
    assert torch.equal(twin(ids).logits, expected)
    assert torch.equal(twin.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    awaken(twin)  # its hooks and wrappers are its own
    assert not torch.equal(twin(ids).logits, expected) and torch.equal(model(ids).logits, expected)
    ahn.detach(twin)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_attention_weights_of_a_chunk() -> None:
    """The base model's "eager" kernel gives weights, on a live cache too."""
    model = student()
    ahn.detach(model)
    model.set_attn_implementation("eager")
    ahn.attach(model, ahn.AHNConfig(window=8, sinks=2))
    cache = start(model, tokens(1, 30))
    out = model(tokens(1, 5, seed=1), past_key_values=cache, output_attentions=True)
    assert all(weights.shape[-2:] == (5, 15) for weights in out.attentions)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones_like(out.attentions[0][..., 0]))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "olmo"])
def test_chunks_below_the_window_are_the_base_models(architecture: str) -> None:
    """To the last bit: until something leaves the window, a later chunk runs on the base model's own kernel."""
    ids = tokens(1, 20)
    plain, model = base(architecture), adapted(architecture, window=30, sinks=2)
    theirs, ours = DynamicCache(config=plain.config), AHNCache.for_model(model)
    for part in ids.split(7, dim=1):
        expected = plain(part, past_key_values=theirs).logits
        assert torch.equal(model(part, past_key_values=ours).logits, expected)


@torch.no_grad()
def test_it_can_be_cropped_as_far_as_crop_says() -> None:
    """transformers 5.24 asks before it lets an assistant guess, with a cache that records."""
    model, ids = student(), tokens(1, LOSSLESS + 1)
    cache = AHNCache.for_model(model)
    model(ids[:, :LOSSLESS], past_key_values=cache)
    assert cache.is_croppable
    copy.deepcopy(cache).crop(-2)
    model(ids[:, LOSSLESS:], past_key_values=cache)
    with pytest.raises(AHNError, match="Cannot crop"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    assert cache.is_croppable
    cache.crop(-LOSSLESS - 1)
