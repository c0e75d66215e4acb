"""The work counted by hand, on a small model and on the shape that the project's goals are stated for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ahn.bench import roofline
from ahn.bench.ceilings import Ceilings
from ahn.bench.methods import Method, make_methods
from ahn.bench.roofline import Flops, Work
from ahn.bench.shapes import configuration

LONG = 131072


def only(name: str, window: int | None = None, sinks: int | None = None) -> Method:
    return make_methods([name], window, sinks)[0]


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration("qwen2.5-3b"), dtype=torch.bfloat16)


def test_step_of_qwen_reads_weights_and_window(qwen: PreTrainedModel) -> None:
    method = only("gated_deltanet")
    with method.on(qwen):
        work = roofline.step(qwen, method.config, LONG, 1)
        later = roofline.step(qwen, method.config, 8 * LONG, 1)
    assert work.parts == {
        "weights": 2 * (3_085_938_688 + 12_982_464),
        "keys and values": 36 * 2 * 32768 * 2 * 128 * 2,
        "states": 36 * 2 * 16 * 128 * 128 * 4,
        "gates": 36 * 2 * 2 * 16 * 2,
    }
    assert later == work  # flat in the context
    # 6.2 GB of weights and 1.2 GB of window at 4.27 TB/s: 1.73 ms; states and the memory's weights add 0.02.
    assert work.limit(Ceilings(4.27e12, 7e14, 1, [], 1, "", [], {})) == pytest.approx(1.75e-3, rel=5e-3)


def test_a_step_reads_all_codes_and_passes_one_gate_on(qwen: PreTrainedModel) -> None:
    (method,) = make_methods(["gated_deltanet"], None, None, quantized=65536)
    with method.on(qwen):
        parts = roofline.step(qwen, method.config, LONG, 1).parts
        plain = roofline.step(qwen, only("gated_deltanet").config, LONG, 1).parts
    token = 2 * (128 // 2 + 128 // 4 + 2 * 2)  # keys of 2 heads at half a byte per number, values at a quarter; scales
    offsets = 2 * 2 * 128 * 4
    assert parts["keys and values"] - plain["keys and values"] == 36 * (65536 * token + offsets)
    assert parts["gates"] == plain["gates"]


def test_prefill_of_qwen_is_linear_work_and_windowed_attention(qwen: PreTrainedModel) -> None:
    window = only("window")
    with window.on(qwen):
        flops = roofline.prefill(qwen, window.config, LONG, 1).flops
    assert flops.linear == pytest.approx(0.73e15, rel=0.01)
    assert flops.attention == pytest.approx(1.1e15, rel=0.01)
    assert flops.head == 2 * 2048 * 151936


def brute_force_attention(length: int, window: int, sinks: int, layers: int, heads: int, head_dim: int) -> int:
    """2 products of 2 FLOPs for each number of each visible key, counted key by key."""
    visible = sum(min(t + 1, window + sinks) for t in range(length))
    return layers * 4 * heads * head_dim * visible


def test_small_model_by_brute_force(model: PreTrainedModel) -> None:
    method = only("window", 20, 4)
    with method.on(model):
        found = roofline.prefill(model, method.config, 100, 3).flops
        step = roofline.step(model, method.config, 100, 3).flops
    layers, D, P, F, V = 2, 32, 8, 48, 61
    per_token = layers * (2 * D * P * (4 + 2) * 2 + 3 * 2 * D * F)
    assert found.linear == 3 * 100 * per_token
    assert step.linear == 3 * per_token
    assert found.head == step.head == 3 * 2 * D * V
    exact = 3 * brute_force_attention(100, 20, 4, layers, 4, P)
    # The paper's count takes half of the square of the first 24 tokens, which leaves out half of the diagonal.
    assert found.attention == exact - 3 * layers * 4 * 4 * P * 24 // 2
    assert step.attention == 3 * layers * 4 * 4 * P * 24


def test_full_attention_grows(model: PreTrainedModel) -> None:
    short, long = (roofline.step(model, None, n, 1) for n in (100, 200))
    assert long.parts["keys and values"] == 2 * short.parts["keys and values"]
    assert long.parts["weights"] == short.parts["weights"]
    assert long.parts["states"] == long.parts["gates"] == 0


def test_weights_leave_out_what_is_not_read(model: PreTrainedModel) -> None:
    everything = sum(p.nbytes for p in model.parameters())
    embedding = model.get_input_embeddings().weight.nbytes
    assert roofline.weights_bytes(model, 1) == everything - embedding
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert roofline.weights_bytes(model, 1) == everything - embedding  # one matrix now, and all of it is read


def test_only_visited_experts_are_read() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=10,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        moe = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    experts = 8 * 3 * 32 * 16 * 4
    assert roofline.weights_bytes(moe, 100) - roofline.weights_bytes(moe, 1) == experts * 6 // 8


def test_training_counts_four_passes(model: PreTrainedModel) -> None:
    method = only("deltanet", 20, 4)
    assert method.config is not None
    with method.on(model, training=True):
        work = roofline.distillation(model, method.config, 100, 1, 75, recomputed=True)
        without = roofline.distillation(model, method.config, 100, 1, 75, recomputed=False)
        forward = roofline.prefill(model, method.config, 100, 1).flops
        teacher = roofline.prefill(model, None, 100, 1).flops
    head = 75 * 2 * 32 * 61
    assert work.parts["teacher forward"] == teacher.linear + teacher.attention + head
    assert work.parts["student forward"] == forward.total - forward.head + head
    assert work.parts["recomputed forward"] == forward.total - forward.head
    assert work.parts["backward"] == forward.linear + 2 * (forward.attention + forward.memory) + head
    assert work.flops.total == sum(work.parts.values())
    assert forward.memory > 0
    assert work.flops.total - without.flops.total == work.parts["recomputed forward"]


@pytest.mark.parametrize(("size", "flops", "by"), [(10**12, 1, "bytes"), (1, 10**14, "flops")])
def test_the_slower_of_two_is_the_limit(ceilings: Ceilings, size: int, flops: int, by: str) -> None:
    found: dict[str, Any] = Work(size, Flops(flops, 0, 0, 0)).report(ceilings, seconds=4.0)
    assert (found["limit_s"], found["limited_by"], found["share"]) == (1.0, by, 0.25)
