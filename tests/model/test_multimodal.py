"""Models that see images: the text after an image, and the image's own tokens, leave the window like any others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from models import awaken, tokens
from support.sighted import BEGIN, END, EYES, IMAGE, KINDS, LOCAL, TEXT, gemma, pictured, prompt, seeing
from transformers import PreTrainedModel

import ahn
from ahn import AHNCache

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention


@torch.no_grad()
def test_images_within_the_window_are_the_bases() -> None:
    plain, given = seeing(), prompt()
    expected, text = plain(**given).logits, plain.generate(**given, max_new_tokens=6, do_sample=False)
    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=100, sinks=3)))
    assert torch.equal(model(**given).logits, expected)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), text)
    with ahn.disabled(model):
        assert torch.equal(model(**given).logits, expected)


@torch.no_grad()
def test_images_that_leave_the_window() -> None:
    """Whole, with a cache, in a next turn and in steps: the same, whatever was read before."""
    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3, prefill_chunk_size=5)))
    ids = tokens(1, 60)
    alone, whole = model(ids).logits, model(**prompt(), use_cache=False).logits
    assert relative_error(model(**prompt()).logits, whole) < TOLERANCE
    assert relative_error(model(ids).logits, alone) < TOLERANCE, "positions of another prompt's image"
    cache, more = AHNCache.for_model(model), tokens(1, 9, seed=5)
    model(**prompt(), past_key_values=cache)
    turn = torch.cat([model(part, past_key_values=cache).logits for part in more.split([4, 1, 1, 3], dim=1)], dim=1)
    assert relative_error(turn, model(**prompt(more), use_cache=False).logits[:, -9:]) < TOLERANCE
    found = model.generate(**prompt(), max_new_tokens=6, do_sample=False)
    logits = model(**prompt(found[:, -6:]), use_cache=False).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), found[:, -6:])


def test_a_kernel_for_the_base_reaches_what_sees() -> None:
    model = ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**prompt())
    ahn.detach(model)
    kernels = {config._attn_implementation for config in (model.config, model.config.vision_config)}
    assert kernels == {"eager"} and model.get_decoder().config._attn_implementation == "eager"


@torch.no_grad()
def test_a_model_that_sees_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = awaken(ahn.attach(seeing(), ahn.AHNConfig(window=13, sinks=3)))
    model.save_pretrained(tmp_path)
    for found in (ahn.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert type(found) is type(model)
        assert torch.equal(found(**prompt()).logits, model(**prompt()).logits)


# -- models that make masks around their decoder, in which the parts of an image see each other ------------------------


def within(**config: Any) -> ahn.AHNConfig:
    return ahn.AHNConfig(**{"window": 13, "sinks": 3} | config)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("version", KINDS)
@torch.no_grad()
def test_images_that_see_themselves_are_the_bases_within_the_window(version: str, kernel: str) -> None:
    plain, given = gemma(version), pictured(version)
    model = awaken(ahn.attach(gemma(version), within(window=100)))
    for each in (plain, model):  # after attach: masks are made before the decoder is asked
        each.set_attn_implementation(kernel)
    for cached in (True, False):
        assert torch.equal(model(**given, use_cache=cached).logits, plain(**given, use_cache=cached).logits)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), plain.generate(**given, **options))
    ahn.set_window(model, 13, 3)
    assert relative_error(model(**given).logits, plain(**given).logits) > 0.01
    with ahn.disabled(model):
        assert torch.equal(model(**given).logits, plain(**given).logits)
    ahn.detach(model)
    assert torch.equal(model(**given).logits, plain(**given).logits)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("version", KINDS)
@torch.no_grad()
def test_images_that_see_themselves_beyond_the_window(version: str, kernel: str) -> None:
    """With a silent memory: the base with an explicit mask of sinks, window and, where it is so, one's own image."""
    model, plain, given = ahn.attach(gemma(version), within()), gemma(version), pictured(version)
    for each in (plain, model):
        each.set_attn_implementation(kernel)
    image, at = given[KINDS[version]][0].bool(), torch.arange(60)
    begins = image & ~image.roll(1)
    of = begins.cumsum(0)
    own = image[:, None] & image & (of[:, None] == of)
    back = at[:, None] - at
    global_sees = (back >= 0) & ((at < 3) | (back < 13))
    sees = {
        "full_attention": global_sees | own if version == "gemma3" else global_sees,
        "sliding_attention": ((back >= 0) | own) & (back < LOCAL),
    }
    masks = {kind: mask[None, None] for kind, mask in sees.items()}
    if kernel == "eager":
        hidden = torch.finfo(torch.float32).min
        masks = {kind: torch.zeros(mask.shape).masked_fill(~mask, hidden) for kind, mask in masks.items()}
    expected = plain(**given | {"attention_mask": masks}).logits
    for cached in (True, False):
        assert relative_error(model(**given, use_cache=cached).logits, expected) < TOLERANCE


@pytest.mark.parametrize("version", KINDS)
@torch.no_grad()
def test_images_that_see_themselves_in_turns_and_padded(version: str) -> None:
    model, given, kind = (
        awaken(ahn.attach(gemma(version), within(prefill_chunk_size=5))),
        pictured(version),
        KINDS[version],
    )
    whole, ids = model(**given, use_cache=False).logits, given["input_ids"]
    for kinds_of_all in (True, False):
        cache, found = AHNCache.for_model(model), []
        for image, (start, stop) in enumerate(((0, 24), (24, 56))):
            part = {name: x[image : image + 1] for name, x in given.items() if name not in ("input_ids", kind)}
            kinds = given[kind][:, 0 if kinds_of_all else start : stop]
            turn = {"input_ids": ids[:, start:stop], kind: kinds}
            found.append(model(**part, **turn, past_key_values=cache).logits)
        found.append(model(ids[:, 56:], past_key_values=cache).logits)
        assert relative_error(torch.cat(found, dim=1), whole) < TOLERANCE
    text = model.generate(**given, max_new_tokens=6, do_sample=False)
    logits = model(**pictured(version, text), use_cache=False).logits
    assert torch.equal(logits[:, -7:-1].argmax(-1), text[:, -6:])
    short = torch.cat([torch.zeros_like(ids[:, :15]), ids[:, :45]], dim=1)
    both = pictured(version, torch.cat([ids, short]))
    both |= {name: torch.cat([x, x[:1]]) for name, x in given.items() if name not in ("input_ids", kind)}
    mask = (both["input_ids"] != 0).long()
    rows = model(**both, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    assert relative_error(rows[0], whole[0]) < TOLERANCE
    assert relative_error(rows[1, 15:], whole[0, :45]) < TOLERANCE, "nothing before it sees the second image"


@pytest.mark.parametrize("version", KINDS)
def test_text_in_a_model_that_makes_masks(version: str) -> None:
    """In chunks, whatever kinds are given, and packed; with gradients."""
    model, ids = awaken(ahn.attach(gemma(version), within(prefill_chunk_size=5))), tokens(1, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for given in ({}, {KINDS[version]: torch.zeros_like(ids)}):
            assert relative_error(model(ids, **given).logits, whole) < TOLERANCE
        twice = torch.arange(30).repeat(2)[None]
        packed = model(ids, position_ids=twice, use_cache=False).logits
        assert relative_error(packed[:, 30:], model(ids[:, 30:]).logits) < TOLERANCE
        with pytest.raises(ahn.AHNError, match="several documents with images"):
            model(**pictured(version), position_ids=twice, use_cache=False)
    model(**pictured(version), labels=ids).loss.backward()
    reads = [p for name, p in ahn.adapter_parameters(model).items() if name.endswith("fn.o_proj.weight")]
    assert reads and all(bool(p.grad.any()) for p in reads)


@pytest.mark.parametrize("version", KINDS)
@torch.no_grad()
def test_a_turn_after_padding_in_a_model_that_counts_columns(version: str) -> None:
    """Gemma 4 gives its decoder positions of its own where nobody names any."""
    model = awaken(ahn.attach(gemma(version, layer_types=["full_attention"] * 2), within()))
    ids, cache, mask = tokens(1, 60), AHNCache.for_model(model), torch.ones(1, 63, dtype=torch.long)
    mask[:, 40:43] = 0
    model(ids[:, :40], past_key_values=cache)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids[:, 40:]], dim=1)
    turn = model(padded, attention_mask=mask, past_key_values=cache).logits
    assert relative_error(turn[:, 3:], model(ids, use_cache=False).logits[:, 40:]) < TOLERANCE


def test_guesses_about_a_text_with_images_that_see_themselves_are_refused() -> None:
    model = awaken(ahn.attach(gemma("gemma3"), within()))
    with pytest.raises(ahn.AHNError, match="generate without guesses"):
        model.generate(**pictured("gemma3"), max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)


# -- models that make a cache around their decoder ---------------------------------------------------------------------


def small(kind: str) -> PreTrainedModel:
    import transformers

    eyes = {name: x for name, x in EYES.items() if name != "model_type"} | {"image_size": 16}
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        vision_config=eyes,
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["SmolVLM", "Idefics3"])
@torch.no_grad()
def test_a_cache_that_is_made_around_the_decoder_is_ours(kind: str) -> None:
    ids = torch.cat([tokens(1, 10), torch.full((1, 4), IMAGE), tokens(1, 30, seed=2)], dim=1)
    pixels = torch.randn(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    plain, given = small(kind), {"input_ids": ids, "pixel_values": pixels}
    expected, text = plain(**given).logits, plain.generate(**given, max_new_tokens=5, do_sample=False)
    model = awaken(ahn.attach(small(kind), ahn.AHNConfig(window=60, sinks=3)))
    assert torch.equal(model(**given).logits, expected)
    assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False), text)
    ahn.set_window(model, 13, 3)
    whole = model(**given, use_cache=False).logits
    output = model(**given)
    assert isinstance(output.past_key_values, AHNCache)
    assert relative_error(output.logits, whole) < TOLERANCE
    assert relative_error(model.model(**given).last_hidden_state, model.model(**given, use_cache=False)[0]) < TOLERANCE
    packed = {"input_ids": ids[:, 14:].repeat(1, 2), "position_ids": torch.arange(30).repeat(2)[None]}
    alone = model(ids[:, 14:], use_cache=False).logits
    assert relative_error(model(**packed).logits[:, 30:], alone) < TOLERANCE, "each document as if alone"
    with ahn.disabled(model):
        assert torch.equal(model(**given).logits, expected)


# -- others that see, by the same way ----------------------------------------------------------------------------------

PATCHES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def another(kind: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A small model, and a picture of four tokens for it (of one, AyaVision)."""
    import transformers

    text = {name: x for name, x in TEXT.items() if name != "rope_parameters"}
    pixels: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))}
    vision: Any = transformers.CLIPVisionConfig(**PATCHES, projection_dim=32)
    own: dict[str, Any] = {"image_token_id": IMAGE}
    language: Any = transformers.LlamaConfig(**text)
    if kind == "Llava":
        own |= {"vision_feature_layer": -1, "image_seq_length": 4}
    elif kind == "InternVL":
        vision = PATCHES | {"image_size": [8, 8], "patch_size": [2, 2]}
        language, own = transformers.Qwen2Config(**text), own | {"image_seq_length": 4}
    elif kind == "AyaVision":
        vision, language = transformers.SiglipVisionConfig(**PATCHES), transformers.CohereConfig(**text)
        own = {"image_token_index": IMAGE, "downsample_factor": 2}
    else:
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3, "out_hidden_size": 32}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        language = TEXT | {"head_dim": 8}
        own |= {"video_token_id": 151, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
        pixels = {"pixel_values": torch.randn(16, 48, generator=torch.Generator().manual_seed(3))}
        pixels |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=language, vision_config=vision, **own)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval(), pixels


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["Llava", "InternVL", "AyaVision", "Qwen3VL"])
@torch.no_grad()
def test_other_models_that_see(kind: str) -> None:
    plain, given = another(kind)
    picture = torch.full((1, 1 if kind == "AyaVision" else 4), IMAGE)
    ids = torch.cat([tokens(1, 4), picture, tokens(1, 30, seed=2)], dim=1)
    given |= {"input_ids": ids} | ({"mm_token_type_ids": (ids == IMAGE).int()} if kind == "Qwen3VL" else {})
    expected, text = plain(**given).logits, plain.generate(**given, max_new_tokens=4, do_sample=False)
    model = awaken(ahn.attach(plain, ahn.AHNConfig(window=100, sinks=3)))
    assert torch.equal(model(**given).logits, expected)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), text)
    ahn.set_window(model, 13, 3)
    beyond = model(**given, use_cache=False).logits
    assert relative_error(beyond, expected) > 0.01
    assert relative_error(model(**given).logits, beyond) < TOLERANCE
    without = model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), without)
