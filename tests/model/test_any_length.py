"""Texts longer than what a base was trained on: no query sees a sink from farther than the base knows."""

from __future__ import annotations

import json
import warnings

import models
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ahn
from ahn.layout.anchors import anchor_moves
from ahn.layout.rotation import anchors
from ahn.shape import trained_length

TRAINED, WINDOW, SINKS, LENGTH = 64, 13, 3, 200
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1000.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "rope_theta": 1000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def base(layers: int, rope: str = "default", **fields: int) -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = LlamaConfig(
        vocab_size=61, num_hidden_layers=layers, max_position_embeddings=TRAINED, rope_parameters=ROPE[rope],
        initializer_range=0.3, **shape | fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(layers: int = 2, memory: str = "deltanet", rope: str = "default", **fields: object) -> PreTrainedModel:
    config = ahn.AHNConfig(memory, WINDOW, SINKS, **(models.FEW if memory == "retained" else {}) | fields)  # type: ignore[arg-type]
    model = ahn.attach(base(layers, rope), config)
    for name, parameter in ahn.adapter_parameters(model).items():
        if name.endswith("o_proj.weight") or (".scorer." in name and parameter.dim() > 1):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPE)
def test_sinks_stand_where_the_anchor_says(rope: str) -> None:
    """In one layer keys depend on their token alone: the base itself can be asked, with positions of our choice."""
    model, plain, ids = adapted(1, "window_only", rope), base(1, rope), tokens()
    found = model(ids).logits
    for t in (TRAINED - 1, TRAINED, TRAINED + 1, TRAINED + 16, LENGTH - 1):
        anchor = int(anchors(torch.tensor(t), TRAINED))
        places = [*range(SINKS), *range(t - WINDOW + 1, t + 1)]
        positions = torch.tensor([[place + anchor if place < SINKS else place for place in places]])
        expected = plain(ids[:, places], position_ids=positions).logits[:, -1]
        assert torch.allclose(found[:, t], expected, atol=1e-4)


@torch.no_grad()
def test_published_placing_is_another() -> None:
    ids = tokens()
    bounded, published = adapted()(ids).logits, adapted(max_distance=0)(ids).logits
    assert torch.equal(bounded[:, :TRAINED], published[:, :TRAINED])  # within the trained length nothing changes
    assert not torch.allclose(bounded[:, TRAINED:], published[:, TRAINED:], atol=1e-2)


@pytest.mark.sample(3)
@torch.no_grad()
@pytest.mark.parametrize("memory", ["deltanet", "window_only", "retained"])
@pytest.mark.parametrize("sizes", [(LENGTH,), (70, 1, 1, 60, 68), (63, *[1] * 137)], ids=["whole", "pieces", "steps"])
def test_whole_is_pieces_is_steps(memory: str, sizes: tuple[int, ...]) -> None:
    model, ids = adapted(memory=memory), tokens()
    model.ahn_config = model.ahn_config.replace(prefill_chunk_size=23)
    expected = model(ids).logits
    model.ahn_config = model.ahn_config.replace(prefill_chunk_size=8192)
    cache = ahn.AHNCache.for_model(model)
    found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(list(sizes), dim=1)], dim=1)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.sample(1)
@torch.no_grad()
@pytest.mark.parametrize("memory", ["deltanet", "retained"])
def test_a_padded_row_is_the_row_alone(memory: str) -> None:
    model, ids = adapted(memory=memory), tokens(2)
    pads = [0, 37]
    mask = torch.ones_like(ids)
    mask[1, : pads[1]] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = ahn.AHNCache.for_model(model)
    split = LENGTH - 5
    logits = [model(ids[:, :split], attention_mask=mask[:, :split], position_ids=positions[:, :split],
                    past_key_values=cache).logits]  # fmt: skip
    for t in range(split, LENGTH):
        logits.append(model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=positions[:, t : t + 1],
                            past_key_values=cache).logits)  # fmt: skip
    found = torch.cat(logits, dim=1)
    for row, pad in enumerate(pads):
        assert torch.allclose(found[row, pad:], model(ids[row : row + 1, pad:]).logits[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("memory", ["deltanet", "retained"])
def test_a_saved_conversation_goes_on_the_same(memory: str, tmp_path) -> None:
    model, ids = adapted(memory=memory), tokens()
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :150], past_key_values=cache)
    cache.save(tmp_path / "c.safetensors")
    loaded = ahn.AHNCache.load(tmp_path / "c.safetensors", model)
    expected = model(ids[:, 150:], past_key_values=cache).logits
    assert torch.allclose(model(ids[:, 150:], past_key_values=loaded).logits, expected, atol=1e-4)


@pytest.mark.sample(1)
@torch.no_grad()
@pytest.mark.parametrize("memory", ["deltanet", "retained"])
def test_rows_are_reordered_with_their_sinks(memory: str) -> None:
    model, ids = adapted(memory=memory), tokens(2)
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :150], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = model(ids[:, 150:].flip(0), past_key_values=cache).logits.flip(0)
    assert torch.allclose(found, model(ids).logits[:, 150:], atol=1e-4)


def test_gradients_stop_at_the_trained_length() -> None:
    model = adapted()
    model(tokens(length=TRAINED)).logits.sum().backward()
    with pytest.raises(ahn.AHNError, match="cut training samples shorter"):
        model(tokens(length=TRAINED + 1))


@torch.no_grad()
def test_more_outputs_at_once_are_refused_beyond_it() -> None:
    with pytest.raises(ahn.AHNError, match="read in chunks"):
        adapted()(tokens(), output_hidden_states=True)


def test_what_attach_fills_in() -> None:
    assert adapted().ahn_config.max_distance == TRAINED
    assert adapted(max_distance=0).ahn_config.max_distance == 0
    dynamic = base(1)
    dynamic.model.rotary_emb.rope_type = "dynamic"
    assert ahn.attach(dynamic, ahn.AHNConfig(window=WINDOW, sinks=SINKS)).ahn_config.max_distance == 0
    with pytest.raises(ahn.AHNError, match="cannot; use max_distance=0"):
        ahn.attach(ahn.detach(dynamic), ahn.AHNConfig(window=WINDOW, sinks=SINKS, max_distance=32))


def test_default_window_follows_the_base() -> None:
    model = ahn.attach(base(1))
    assert (model.ahn_config.sinks, model.ahn_config.window) == (4, 28)
    with pytest.warns(UserWarning, match="more than the 64 that the base model was trained on"):
        ahn.attach(base(1), ahn.AHNConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ahn.attach(base(1), ahn.AHNConfig(window=60, sinks=4))


@pytest.mark.parametrize(
    ("trained", "said"), [(8192, "window 3968 and sinks 128"), (131_072, "window 32640 and sinks 128")]
)
def test_a_window_that_follows_the_base_is_said(trained: int, said: str) -> None:
    model = base(1)
    model.config.max_position_embeddings = trained
    with pytest.warns(UserWarning, match=f"{said} follow the {trained} positions of the base") as told:
        ahn.attach(model)
    assert len(told) == 1 and told[0].filename == __file__
    config = ahn.detach(model) and ahn.AHNConfig.for_base(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ahn.attach(model, config).ahn_config.window == config.window


@pytest.mark.parametrize(("rope", "length"), [("default", 64), ("linear", 64), ("yarn", 64), ("llama3", 64)])
def test_trained_length(rope: str, length: int) -> None:
    assert trained_length(base(1, rope).config) == length


@pytest.mark.parametrize(("window", "sinks", "trained"), [(32640, 128, 32768), (480, 32, 8192), (7000, 100, 8192)])
def test_sinks_always_have_a_place_before_the_window(window: int, sinks: int, trained: int) -> None:
    config = ahn.AHNConfig(window=window, sinks=sinks, max_distance=trained)
    positions = torch.arange(config.reach, 4 * config.reach, 7)
    nearest = int((positions - anchors(positions, config.reach)).min())
    assert nearest >= config.lossless
    assert config.reach == trained or config.lossless > trained * 3 // 4


def test_cuts_are_where_anchors_move() -> None:
    at = anchors(torch.arange(500), 64)
    moved = [t for t in range(1, 500) if at[t] != at[t - 1]]
    for first, last in ((0, 499), (63, 64), (64, 100), (80, 81), (100, 499)):
        assert anchor_moves(first, last, 64) == [t for t in moved if first < t <= last]


@torch.no_grad()
def test_published_placing_says_so_once_beyond_the_trained_length() -> None:
    model = adapted(max_distance=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(length=TRAINED))
    with pytest.warns(UserWarning, match="longer than the 64 positions"):
        model(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens())


def test_saved_settings_keep_their_placing(tmp_path) -> None:
    ahn.save_adapter(adapted(), tmp_path / "bounded")
    assert ahn.load_adapter(base(2), tmp_path / "bounded").ahn_config.max_distance == TRAINED
    ahn.save_adapter(adapted(max_distance=0), tmp_path / "published")
    assert ahn.load_adapter(base(2), tmp_path / "published").ahn_config.max_distance == 0
    assert ahn.load_adapter(base(2), tmp_path / "published", max_distance=48).ahn_config.max_distance == 48


def test_older_adapters_keep_the_published_placing(tmp_path) -> None:
    ahn.save_adapter(adapted(), tmp_path)
    file = tmp_path / "config.json"
    described = json.loads(file.read_text())
    del described["ahn"]["max_distance"]
    file.write_text(json.dumps(described))
    assert ahn.load_adapter(base(2), tmp_path).ahn_config.max_distance == 0


@pytest.mark.sample(2)
@torch.no_grad()
@pytest.mark.parametrize("rope", ROPE)
def test_anchors_that_move_within_a_forward(rope: str) -> None:
    """Retained tokens move sooner than sinks: without a cache the queries of one forward see them in several places."""
    model, ids = adapted(memory="retained", rope=rope), tokens(2, TRAINED)
    expected, whole = model(ids).logits, model(ids, use_cache=False).logits
    assert torch.allclose(whole, expected, atol=1e-4)
    pads = torch.tensor([0, 9])
    mask = (torch.arange(TRAINED) >= pads[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    shifted = torch.cat([ids[:1], ids[1:].roll(9, 1)])
    found = model(shifted, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.allclose(found[1, 9:], expected[1, :-9], atol=1e-4)
    model.ahn_config = model.ahn_config.replace(max_distance=0)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
