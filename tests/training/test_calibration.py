"""The basis of keys is made of what the base's own full attention looks at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import base, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.errors import AHNError
from ahn.training import calibration
from ahn.training.calibration import calibrate

W, S, C = 8, 2, 20
CONFIG = ahn.AHNConfig("window_only", W, S, quantized=C, key_bits=2, value_bits=2, calibrated_keys=True)


def turned(x: Tensor, by: int, theta: float) -> Tensor:
    """x (P,) turned by a position, in Llama's order of pairs (arXiv 2104.09864)."""
    half = len(x) // 2
    angle = by * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The four moments of the first layer, its key heads one by one, every distance a query's own."""
    layer, L, P = model.model.layers[0], ids.shape[1], model.config.head_dim
    theta = model.config.rope_parameters["rope_theta"]
    x = layer.input_layernorm(model.model.embed_tokens(ids))[0]
    q = layer.self_attn.q_proj(x).view(L, -1, P).double()
    k = layer.self_attn.k_proj(x).view(L, -1, P).double()
    weights = model(ids, output_attentions=True).attentions[0][0].double()
    found = {name: torch.zeros(2, P, P, dtype=torch.float64) for name in ("attending", "keys", "attended")}
    for head in (0, 1):
        centred = k[:, head] - k[S : S + W, head].mean(0)
        found["keys"][head] = centred[S : L - W].T @ centred[S : L - W]
        for query in (2 * head, 2 * head + 1):
            for t in range(S + W, L):
                for p in range(S, t - W + 1):
                    seen = turned(q[t, query], t - p, theta)
                    found["attending"][head] += weights[query, t, p] * seen.outer(seen)
                    found["attended"][head] += weights[query, t, p] * centred[p].outer(centred[p])
    return found


def test_moments_are_those_of_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base("llama", head_dim=8, attn_implementation="eager")
    ids = tokens(1, 26)
    expected = by_hand(model, ids)
    # One distance for each that occurs: 8 to 25, by their logarithm closest together at the far end.
    monkeypatch.setattr(calibration, "DISTANCES", 400)
    seen: list[calibration.Moments] = []
    own = calibration.Moments.basis
    monkeypatch.setattr(calibration.Moments, "basis", lambda self: seen.append(self) or own(self))
    assert calibrate(ahn.attach(model, CONFIG.replace(max_distance=0)), [ids]) == 26
    found = vars(seen[0])
    for name, x in expected.items():
        assert torch.allclose(found[name], x, rtol=1e-3, atol=1e-3 * x.abs().max().item()), name


def test_a_basis_whitens_keys_in_the_metric_of_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 100, 8, generator=generator).double() for _ in range(2))
    M, K = queries.mT @ queries, keys.mT @ keys
    weight, deviations = calibration.Moments(M, torch.zeros_like(M), K, torch.zeros_like(K)).basis()
    mean = K.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    of_keys = weight @ (K / mean) @ weight.mT
    assert torch.allclose(of_keys, torch.diag_embed(deviations.square()), atol=1e-10)
    assert bool((deviations.diff() <= 0).all()) and torch.allclose(deviations[:, 0], torch.ones(2).double())
    metric = weight.mT @ weight  # M, but for its scale and the floor
    expected = M / M.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + calibration.FLOOR * torch.eye(8)
    scale = metric[:, :1, :1] / expected[:, :1, :1]
    assert torch.allclose(metric, scale * expected, atol=1e-10)


def calibrated(texts: list[Tensor] | None = None) -> PreTrainedModel:
    model = ahn.attach(base(), CONFIG)
    calibrate(model, texts or [tokens(2, 60), tokens(1, 90, seed=3)])
    return model


@torch.no_grad()
def test_scores_err_less_than_without() -> None:
    """On the text itself; the base is random, so that its directions differ by little."""
    ids = tokens(2, 90, seed=4)
    full = base()(ids).logits
    errors = []
    for model in (ahn.attach(base(), CONFIG.replace(calibrated_keys=False)), calibrated([ids])):
        errors.append((model(ids).logits - full).square().mean().item())
    assert errors[1] < errors[0]


@torch.no_grad()
def test_padding_is_not_read() -> None:
    ids = tokens(1, 60)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 60)], dim=1).long()
    padded = {"input_ids": torch.cat([torch.full((1, 9), 7), ids], dim=1), "attention_mask": mask}
    first, second = (calibrated([batch]) for batch in (ids, padded))
    for name, x in ahn.adapter_parameters(first).items():
        assert torch.equal(x, ahn.adapter_parameters(second)[name])


def test_settings_come_back() -> None:
    model = calibrated()
    assert model.ahn_config.replace(max_distance=None) == CONFIG
    assert all(not x.requires_grad for x in ahn.adapter_parameters(model).values())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = calibrated().to(dtype)
    ahn.save_adapter(model, tmp_path)
    again = ahn.load_adapter(base().to(dtype), tmp_path)
    assert again.ahn_config == model.ahn_config
    ids = tokens(1, 60)
    assert torch.equal(again(ids).logits, model(ids).logits)
    cache = ahn.AHNCache.for_model(model)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "conversation.safetensors")
    loaded = ahn.AHNCache.load(tmp_path / "conversation.safetensors", again)
    new = tokens(1, 5, seed=8)
    assert torch.equal(again(new, past_key_values=loaded).logits, model(new, past_key_values=cache).logits)


def test_what_was_not_calibrated_is_refused(tmp_path: Path) -> None:
    model = ahn.attach(base(), CONFIG)
    with pytest.raises(AHNError, match="not been calibrated"), torch.no_grad():
        model(tokens(1, 40))
    with pytest.raises(AHNError, match="not been calibrated"):
        ahn.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(AHNError, match=r"not been calibrated.*Calibrate it before it is saved"):
        model.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(AHNError, match="have no basis"):
        calibrate(ahn.attach(base(), CONFIG.replace(calibrated_keys=False)), [tokens(1, 60)])
    with pytest.raises(AHNError, match="more than 18 tokens"):
        calibrate(model, [tokens(3, 18)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x["weight"].mul_(0), "not been calibrated"),
        (lambda x: x["weight"][0, 1].copy_(x["weight"][0, 0]), "cannot be inverted"),
        (lambda x: x["deviations"][1, 3].neg_(), "not positive"),
        (lambda x: x["deviations"][1, 3].fill_(float("nan")), "NaN"),
    ],
)
def test_a_damaged_adapter_is_refused(damage: object, message: str, tmp_path: Path) -> None:
    ahn.save_adapter(calibrated(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first = "model.layers.0.ahn.fn.key_basis."
    damage({name: tensors[first + name] for name in ("weight", "deviations")})  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors")
    model = base()
    with pytest.raises(AHNError, match=message):
        ahn.load_adapter(model, tmp_path)
    assert not hasattr(model, "ahn_config")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AHNError, match=message):
        ahn.merge(tmp_path / "base", tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_its_basis_is_refused(tmp_path: Path) -> None:
    ahn.save_adapter(calibrated(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["ahn"]["calibrated_keys"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AHNError, match="should not have"):
        ahn.load_adapter(base(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_bits": 4}, "key_bits=2"),
        ({"keys_before_rope": False}, "keys_before_rope=True"),
        ({"memory": "retained"}, "keeps tokens"),
        ({"calibrated_keys": 1}, "True or False"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AHNError, match=message):
        CONFIG.replace(**changes)
