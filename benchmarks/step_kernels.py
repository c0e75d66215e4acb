"""What each part of a captured step costs on this GPU, variant by variant; an experiment, not a benchmark.

python benchmarks/step_kernels.py            # an H100 or H200; about four minutes, the table comes last
python benchmarks/step_kernels.py --parts correct products
python benchmarks/step_kernels.py --smoke    # a CPU: only that it runs

Parts: `correct` (300 captured steps across the window's edge against ordinary ones, small models), `products` (our
kernel over 36 different layers' weights, by what a program takes and with or without early launches), `steps`
(Qwen2.5-3B's shape at 128k: the step as it was, with fused products, with early launches, and settings of attention).
With early launches a kernel's time includes its waiting, so times of kernels add up to more than the step.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import ahn
import ahn.compiled
from ahn.bench import fill, model, shapes
from ahn.bench.methods import make_methods
from ahn.decode import runner
from ahn.ops import dependent, product_triton, step_triton
from ahn.ops.product import reference

START = time.perf_counter()
RESULTS: list[str] = []
LINEAR = torch._C._nn.linear


def log(text: str, result: bool = False) -> None:
    print(f"[{time.perf_counter() - START:6.1f}] {text}", flush=True)
    if result:
        RESULTS.append(text)


# -- variants ----------------------------------------------------------------------------------------------------------


def as_it_was(graph: fx.Graph) -> None:
    """The step before fusion: a product with one row as a reduction for inductor, long rows for our kernel."""
    for node in list(graph.nodes):
        if node.target is not LINEAR or node.args[0].meta["example_value"].numel() != node.args[1].meta[
            "example_value"].shape[1]:  # fmt: skip
            continue
        x, weight, bias = (*node.args, None)[:3]
        shape = tuple(node.meta["example_value"].shape)
        with graph.inserting_before(node):
            if weight.meta["example_value"].shape[1] >= 4096:
                operator = torch.ops.ahn.product.default
                y = graph.call_function(operator, (x, [weight], [None], None, 0.0, False, None))
            else:
                row = graph.call_method("reshape", (x, 1, -1))
                y = graph.call_function(torch.mm, (row, graph.call_method("t", (weight,))))
            y = graph.call_method("view", (y, shape))
            y = y if bias is None else graph.call_function(torch.add, (y, bias))
        node.replace_all_uses_with(y)
        graph.erase_node(node)


@contextlib.contextmanager
def variant(
    fused: bool = True, early: bool = True, inductor_early: bool = False, steps: dict[str, Any] | None = None,
    products: dict[str, Any] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Inside, steps are captured so."""
    with contextlib.ExitStack() as stack:
        if not fused:
            stack.enter_context(mock.patch.object(ahn.compiled, "fuse", as_it_was))
        if not early:
            stack.enter_context(mock.patch.object(dependent, "options", lambda x: {"PDL": False}))
        if inductor_early:
            options = ahn.compiled._OPTIONS | {"triton.enable_pdl": True}
            stack.enter_context(mock.patch.object(ahn.compiled, "_OPTIONS", options))
        for name, value in (steps or {}).items():
            stack.enter_context(mock.patch.object(step_triton, name, value))
        if products:
            plain = product_triton.product
            stack.enter_context(mock.patch.object(product_triton, "product", lambda *args: plain(*args, **products)))
        torch._dynamo.reset()
        runner._runners.clear()
        yield


# -- correct -----------------------------------------------------------------------------------------------------------


def correct(smoke: bool) -> None:
    """Logits of small models: captured steps against ordinary ones, and in bfloat16 both against float32."""
    device = "cpu" if smoke else "cuda"
    for kind in ("qwen2", "qwen3"):
        fields = {"head_dim": 64} if kind == "qwen3" else {}
        config = type(shapes.configuration("qwen2.5-3b" if kind == "qwen2" else "qwen3-4b"))(
            hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=97, initializer_range=0.15, **fields,
        )  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16):
            small = model.build(copy.deepcopy(config), torch.device(device), dtype)
            ahn.attach(small, ahn.AHNConfig(window=40, sinks=4))
            for name, parameter in ahn.adapter_parameters(small).items():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.3 if name.endswith("o_proj.weight") else 0.1)
            count = 30 if smoke else 300
            ids = torch.randint(97, (1, 20 + count), device=device)
            ordinary, captured = _logits(small, ids, False), _logits(small, ids, True)
            error = float((captured - ordinary).norm() / ordinary.norm())
            if dtype == torch.float32:
                log(f"correct {kind} float32: captured against ordinary {error:.1e} (expected below 1e-4)", True)
            else:
                exact = _logits(small.float(), ids, False)
                errors = [float((x - exact).norm() / exact.norm()) for x in (captured, ordinary)]
                log(
                    f"correct {kind} bfloat16, against float32: captured {errors[0]:.4f}, ordinary {errors[1]:.4f}",
                    True,
                )


@torch.inference_mode()
def _logits(small: Any, ids: Tensor, captured: bool) -> Tensor:
    cache = ahn.AHNCache.for_model(small)
    known = runner.on_gpu
    with mock.patch.object(runner, "on_gpu", known if captured else lambda ids: False):
        found = [small(ids[:, :20], past_key_values=cache).logits[:, -1:]]
        found += [small(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, ids.shape[1])]
    assert (cache in runner._runners) == captured, "nothing was captured"
    return torch.cat(found, 1).float()


# -- products ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "q, k, v, gates": {"sizes": (2048, 256, 256, 16, 16, 16), "K": 2048, "norm": True},
    "o_proj": {"sizes": (2048,), "K": 2048, "residual": True},
    "gate, up": {"sizes": (11008, 11008), "K": 2048, "norm": True, "silu": True},
    "down_proj": {"sizes": (2048,), "K": 11008, "residual": True},
}
SETTINGS = [(4, 2048, 8), (2, 2048, 8), (8, 2048, 8), (4, 1024, 4), (8, 1024, 4), (2, 1024, 4), (1, 2048, 8)]


@torch.inference_mode()
def products() -> None:
    """Microseconds of our kernel in a graph of 36 layers, each with weights of its own."""
    limit = time.perf_counter() + 110
    for name, kind in KINDS.items():
        rows = _product_times(name, limit, **kind)
        for early in (True, False):
            best = sorted(row[:2] for row in rows if row[2] == early)[:3]
            found = ", ".join(f"{micros:.2f} µs {setting}" for micros, setting in best)
            log(f"product {name} early={early}: {found}", True)
        torch.cuda.empty_cache()


def _product_times(
    name: str, limit: float, sizes: tuple[int, ...], K: int, norm: bool = False, silu: bool = False,
    residual: bool = False,
) -> list[tuple[float, tuple[int, int, int], bool]]:  # fmt: skip
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    layers, rows = 36, []
    weights = [[random(n, K) / K**0.5 for n in sizes] for _ in range(layers)]
    rest = ([None] * len(sizes), random(K) if norm else None, 1e-6, silu, random(sizes[0]) if residual else None)
    x, bytes_ = random(K), 2 * K * sum(sizes)
    for setting in SETTINGS:
        for early in (True, False):
            if time.perf_counter() > limit:
                return rows
            with contextlib.ExitStack() as stack:
                if not early:
                    stack.enter_context(mock.patch.object(dependent, "options", lambda x: {"PDL": False}))
                run = functools.partial(_all_layers, x, weights, rest, setting)
                found, expected = run()[-1].float(), reference(x, weights[-1], *rest).float()
                seconds = _timed(_graph(run), 10) / layers
            error = float((found - expected).norm() / expected.norm())
            rows.append((seconds * 1e6, setting, early))
            rate = bytes_ / seconds / 1e12
            log(f"  {name} {setting} early={early}: {seconds * 1e6:.2f} µs, {rate:.2f} TB/s, error {error:.1e}")
    return rows


def _all_layers(x: Tensor, weights: list[list[Tensor]], rest: tuple[Any, ...], setting: Any) -> list[Tensor]:
    return [product_triton.product(x, own, *rest, *setting) for own in weights]


def _graph(work: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.held = work()
    return graph.replay


def _timed(work: Callable[[], Any], count: int) -> float:
    """Median of five times `count` runs, seconds of one."""
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return statistics.median(times[1:])


# -- steps -------------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "as it was": {"fused": False, "early": False},
    "fused": {"early": False},
    "fused, early": {},
    "fused, early, inductor's too": {"inductor_early": True},
    "fused, early, 2 stages": {"steps": {"STAGES": 2}},
    "fused, early, 256 parts": {"steps": {"SPLITS": 256, "PROGRAMS_A_PROCESSOR": 32, "STAGES": 2}},
    "fused, early, 64 parts, 128 keys, 2 stages": {"steps": {"SPLITS": 64, "TILE_BYTES": 32768, "STAGES": 2}},
    "fused, early, 2 rows": {"products": {"rows": 2}},
}


@torch.inference_mode()
def steps(smoke: bool, name: str, context: int) -> None:
    device = torch.device("cpu" if smoke else "cuda")
    (method,) = make_methods(["gated_deltanet"], 40 if smoke else None, 4 if smoke else None)
    subject = model.load("tiny" if smoke else name, True, device, torch.bfloat16)
    log(f"{subject.name}: {sum(p.numel() for p in subject.model.parameters()) / 1e9:.2f} G weights")
    with method.on(subject.model):
        for label, how in VARIANTS.items():
            if time.perf_counter() - START > 400:
                log(f"{label}: no time left", True)
                continue
            torch.cuda.empty_cache()
            try:
                _one_variant(subject.model, method, label, how, context)
            except Exception as error:
                log(f"{label}: {type(error).__name__}: {str(error)[:300]}", True)


def _one_variant(base: Any, method: Any, label: str, how: dict[str, Any], context: int) -> None:
    with variant(**how):
        torch.manual_seed(0)
        cache = fill.synthetic_cache(method, base, 1, context, context + 1)
        ids = fill.random_tokens(base, 1, 1)
        begin = time.perf_counter()
        base(input_ids=ids, past_key_values=cache)
        captured = runner._runners[cache]
        if not ids.is_cuda:
            log(f"{label}: runs", True)
            return
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        replay = _timed(captured.replay, 20)
        step = _timed(functools.partial(base, input_ids=ids, past_key_values=cache), 20)
        log(f"{label}: {step * 1e3:.3f} ms a step, {replay * 1e3:.3f} ms a replay (first step {first:.0f} s)", True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            captured.replay()
            torch.cuda.synchronize()
        rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
        for row in rows[:14]:
            log(f"    {row.self_device_time_total / row.count:8.2f} µs x {row.count:4d}  {row.key[:90]}")
        log(f"    kernels: {sum(row.count for row in rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["correct", "steps", "products"],
                        choices=["correct", "products", "steps"])  # fmt: skip
    parser.add_argument("--shape", default="qwen2.5-3b")
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.smoke:
        _without_gpu()
    else:
        log(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dependent.options(torch.ones(1).cuda())}")
    for part in given.parts:
        log(f"== {part}")
        if part == "correct":
            correct(given.smoke)
        elif part == "products" and not given.smoke:
            products()
        elif part == "steps":
            steps(given.smoke, given.shape, 200 if given.smoke else given.context)
    print("\n== results\n" + "\n".join(RESULTS))


def _without_gpu() -> None:
    def capture(model: Any, once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with ahn.compiled.layers_compiled(model):
            logits = once()

        def replay() -> None:
            with ahn.compiled.layers_compiled(model):
                logits.copy_(once())

        return replay, logits

    runner.capture, runner.on_gpu = capture, lambda ids: True
    torch._inductor.compile = lambda module, inputs, options: module.forward


if __name__ == "__main__":
    main()
