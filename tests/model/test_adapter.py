"""Attach, detach and disable: what is refused and how, what is left alone, and that importing changes nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from golden import relative_error
from models import ARCHITECTURES, RECURRENT, adapted, awaken, base, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

import ahn
from ahn import AHNConfig, AHNError
from ahn.model.route import dense_mask_kernel

TOLERANCE = 1e-4  # float32 in another order of operations, through two layers with sharp attention

# -- what cannot be adapted --------------------------------------------------------------------------------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
LATENT = {
    "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 2,
}  # fmt: skip
UNSUPPORTED = {
    "GPT2": ({"num_attention_heads": 4}, "GPT2LMHeadModel has no decoder with a list of layers"),
    "GPTNeoX": ({"num_attention_heads": 4, "intermediate_size": 32}, "GPTNeoXLayer has no self_attn"),
    "Mistral": (HEADS | {"sliding_window": 8}, "No layer is left for a memory: every layer uses sliding"),
    "DeepseekV3": (HEADS | LATENT, "DeepseekV3Attention has no q_proj, k_proj, v_proj; latent attention"),
    "Mamba": ({"state_size": 4}, "MambaConfig has no num_attention_heads"),
}


def test_classes_are_read_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python parses a whole modeling file for each class: a tenth of a second that every further model would pay."""
    adapted()
    asked: list[Any] = []
    read = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: asked.append(of) or read(of))
    adapted()
    assert not [of for of in asked if isinstance(of, type)]


def _build(name: str, extra: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**TINY | extra)
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, name + kind)(config).eval()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(name: str) -> None:
    extra, message = UNSUPPORTED[name]
    model = _build(name, extra)
    before, attributes = set(model.state_dict()), set(vars(model))
    with pytest.raises(AHNError, match=message):
        ahn.attach(model)
    assert set(model.state_dict()) == before and set(vars(model)) == attributes
    assert model.config._attn_implementation != "ahn"


class OwnAttention(nn.Module):
    """Attention that computes its own scores."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 64) for _ in range(3))
        self.o_proj = nn.Linear(features, 32)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.q_proj(hidden_states)), None


class NoKeywords(OwnAttention):
    """Attention that has nowhere to put its memory's input."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, hidden_states), None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OwnAttention(), "OwnAttention does not call transformers' attention interface"),
        (NoKeywords(), r"NoKeywords.forward takes no \*\*kwargs"),
        (OwnAttention(features=48), "OwnAttention.o_proj takes 48 features, not 4 heads of 16"),
        (nn.Identity(), "Identity has no q_proj"),
    ],
)
def test_foreign_attention_is_refused(module: nn.Module, message: str) -> None:
    model = base()
    model.model.layers[1].self_attn = module
    with pytest.raises(AHNError, match=message):
        ahn.attach(model)
    assert not hasattr(model.model.layers[0], "ahn"), "nothing is attached before everything was checked"
    ahn.attach(model, AHNConfig(full_attention_layers=(1,)))  # a layer without a memory may be what it likes


# -- attach ------------------------------------------------------------------------------------------------------------


def test_attach_once_detach_once() -> None:
    model = base()
    for call in (
        lambda: ahn.detach(model),
        lambda: ahn.set_window(model, 3, 1),
        lambda: ahn.adapter_parameters(model),
        lambda: ahn.disabled(model).__enter__(),
    ):
        with pytest.raises(AHNError, match=r"no AHN; call ahn\.attach"):
            call()
    assert ahn.attach(model) is model
    with pytest.raises(AHNError, match=r"already has an AHN; call ahn\.detach"):
        ahn.attach(model)
    assert ahn.detach(model) is model
    ahn.attach(model)


@pytest.mark.parametrize("memory", RECURRENT)
def test_parameters_have_the_published_names(memory: str) -> None:
    model = ahn.attach(base(), AHNConfig(memory=memory, router=True, q_proj=True, full_attention_layers=(0,)))
    parameters = ahn.adapter_parameters(model)
    own = {f"model.layers.1.ahn.fn.{name}" for name, _ in model.model.layers[1].ahn.fn.named_parameters()}
    assert parameters.keys() == own | {f"model.layers.1.ahn_router.{name}" for name in ("alpha", "beta")}
    assert tuple(parameters["model.layers.1.ahn.fn.q_proj.weight"].shape) == (4, 16, 16)
    assert tuple(parameters["model.layers.1.ahn_router.alpha"].shape) == (4,)
    named = dict(model.named_parameters())
    assert all(named[name] is p and p.requires_grad for name, p in parameters.items())
    assert list(parameters) == [name for name in named if name in parameters]


@torch.no_grad()
def test_new_parameters_are_float32_beside_a_half_precision_base() -> None:
    model = ahn.attach(base().bfloat16(), AHNConfig(router=True))
    assert {p.dtype for p in ahn.adapter_parameters(model).values()} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.sample(4)
@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_adapter_is_sinks_and_window(architecture: str) -> None:
    """Its output projection is zero: training starts from what the model would do without a memory."""
    ids, options = tokens(2, 40), {"window": 9, "sinks": 2}
    new = ahn.attach(base(architecture), AHNConfig(**options, router=True, q_proj=True))
    forgetful = ahn.attach(base(architecture), AHNConfig(memory="window_only", **options))
    assert torch.equal(new(ids).logits, forgetful(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [(0,), (1,)])
def test_full_attention_layers_are_the_bases(chosen: tuple[int, ...]) -> None:
    ids = tokens(2, 40)
    model = adapted(window=9, sinks=2, full_attention_layers=chosen)
    assert [hasattr(layer, "ahn") for layer in model.model.layers] == [i not in chosen for i in range(2)]
    found = model(ids, output_hidden_states=True).hidden_states
    expected = base()(ids, output_hidden_states=True).hidden_states
    assert torch.equal(found[1], expected[1]) == (0 in chosen)
    if 1 in chosen:
        layer, rope = base().model.layers[1], base().model.rotary_emb(found[1], torch.arange(40)[None])
        alone = base().model.norm(layer(found[1], position_embeddings=rope))
        assert relative_error(found[2], alone) < TOLERANCE


@pytest.mark.parametrize(
    ("layers", "message"),
    [((2,), "names layer 2, but the model has layers 0 to 1"), ((0, 1), "No layer is left for a memory")],
)
def test_full_attention_layers_out_of_range(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(AHNError, match=message):
        ahn.attach(base(), AHNConfig(full_attention_layers=layers))


def test_only_full_attention_layers_of_a_mixed_model_get_a_memory() -> None:
    model = ahn.attach(base("gemma3"))
    assert [hasattr(layer, "ahn") for layer in model.model.layers] == [False, True]


@torch.no_grad()
def test_every_way_to_call_the_model() -> None:
    model, ids = adapted(window=9, sinks=2, prefill_chunk_size=7), tokens(2, 30)
    expected = model(ids, use_cache=False).logits
    mask = torch.ones_like(ids)
    for found in (
        model(ids).logits,
        model(input_ids=ids).logits,
        model(ids, mask).logits,
        model(ids, mask, None, None).logits,
        model.lm_head(model.model(ids).last_hidden_state),
        model.lm_head(model.model(input_ids=ids, use_cache=False)[0]),
        model.forward(ids)[0],
    ):
        assert relative_error(found, expected) < TOLERANCE
    with pytest.raises(ValueError, match="input_ids"):  # the base model's own words
        model()
    with pytest.raises(AHNError, match="outside its model"):
        rope = model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
        model.model.layers[0](torch.zeros(1, 3, 32), position_embeddings=rope)


def test_signatures_are_the_base_models() -> None:
    plain, model = base(), ahn.attach(base())
    for name in ("forward", "generate"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(plain, name))


def test_kernels_without_a_dense_mask_have_a_stand_in() -> None:
    """sdpa knows neither learned sinks nor a soft cap."""
    for kernel in ("sdpa", "eager"):
        assert dense_mask_kernel(kernel, {"softcap": 50.0}) == kernel
    assert dense_mask_kernel("flash_attention_2", {"softcap": None, "s_aux": None}) == "sdpa"
    assert dense_mask_kernel("flash_attention_2", {"softcap": 50.0}) == "eager"
    assert dense_mask_kernel("flash_attention_3", {"s_aux": torch.zeros(4)}) == "eager"


# -- disabled, set_window ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_disabled_nests_and_survives_errors() -> None:
    model, ids = adapted(window=9, sinks=2), tokens(2, 30)
    student, teacher = model(ids).logits, base()(ids).logits
    with ahn.disabled(model):
        assert torch.equal(model(ids).logits, teacher)
        with ahn.disabled(model):
            assert torch.equal(model(ids).logits, teacher)
        assert torch.equal(model(ids).logits, teacher), "the inner block does not switch the outer one off"
    assert torch.equal(model(ids).logits, student)
    with pytest.raises(KeyError), ahn.disabled(model):
        raise KeyError
    assert torch.equal(model(ids).logits, student)
    with ahn.disabled(model):
        ahn.detach(model)
    assert torch.equal(model(ids).logits, teacher)


@torch.no_grad()
def test_one_model_disabled_leaves_others_alone() -> None:
    first, second, ids = adapted(window=9, sinks=2), adapted(window=9, sinks=2), tokens(2, 30)
    expected = second(ids).logits
    with ahn.disabled(first):
        assert torch.equal(second(ids).logits, expected)
    ahn.detach(first)
    assert torch.equal(second(ids).logits, expected)


@torch.no_grad()
def test_set_window() -> None:
    model, ids = adapted(window=9, sinks=2), tokens(2, 30)
    cache = ahn.AHNCache.for_model(model)
    model(ids[:, :20], past_key_values=cache)
    expected = model(ids).logits
    ahn.set_window(model, window=5, sinks=0)
    assert (model.ahn_config.window, model.ahn_config.sinks) == (5, 0)
    other = awaken(ahn.attach(base(), AHNConfig(window=5, sinks=0)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, other(ids).logits)
    found = model(ids[:, 20:], past_key_values=cache).logits
    assert relative_error(found, expected[:, 20:]) < TOLERANCE, "a conversation keeps its window"
    for window, sinks in ((0, 1), (4, -1), (2.5, 0)):
        with pytest.raises(AHNError, match="must be an integer"):
            ahn.set_window(model, window, sinks)
    assert model.ahn_config.window == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "window must be an integer ≥ 1, got 0"),
        ({"window": True}, "window must be an integer"),
        ({"sinks": -1}, "sinks must be an integer ≥ 0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be an integer ≥ 1"),
        ({"router": 1}, "router must be True or False"),
        ({"key_bits": 1}, "key_bits must be 2, 3, 4, or 16 .*, got 1"),
        ({"value_bits": 5}, "value_bits must be 2, 3, 4, or 16 .*, got 5"),
        ({"value_bits": 2.0}, "value_bits must be 2, 3, 4, or 16"),
        ({"keys_before_rope": 0}, "keys_before_rope must be True or False"),
        ({"full_attention_layers": (-1,)}, "layer indices ≥ 0"),
        ({"full_attention_layers": 3}, "layer indices ≥ 0"),
        ({"memory": "lstm"}, "Unknown memory 'lstm'"),
        ({"window": 2**70}, "window can be 1099511627776 at most"),
        ({"max_distance": 2**70}, "integer from 16 to 1099511627776"),
    ],
)
def test_configurations_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AHNError, match=message):
        AHNConfig(**values)


# -- importing ---------------------------------------------------------------------------------------------------------

_IMPORT = """
import logging, os, sys, warnings
import torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import Qwen2ForCausalLM, PreTrainedModel

def state():
    loggers = [logging.getLogger()] + [logging.getLogger(name) for name in ("transformers", "torch", "ahn")]
    return {
        "attention": sorted(ALL_ATTENTION_FUNCTIONS), "masks": sorted(ALL_MASK_ATTENTION_FUNCTIONS),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(), "random": torch.get_rng_state().sum().item(),
        "grad": torch.is_grad_enabled(), "filters": list(warnings.filters), "environment": dict(os.environ),
        "loggers": [(x.level, list(x.handlers)) for x in loggers],
        "methods": [PreTrainedModel.__init__, Qwen2ForCausalLM.forward, Qwen2ForCausalLM.generate],
        "hooks": [sys.excepthook, sys.displayhook],
    }

before, loaded = state(), set(sys.modules)
import ahn
after = state()
assert before == after, {name: (before[name], after[name]) for name in before if before[name] != after[name]}
heavy = [name for name in ("triton", "typer", "rich", "matplotlib") if name in set(sys.modules) - loaded]
assert not heavy, heavy
"""


@pytest.mark.slow
def test_importing_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
