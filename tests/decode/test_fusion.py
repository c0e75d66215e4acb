"""Fused products in a layer's graph: which are found in which architecture, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from support.modeling import norm
from torch import Tensor, nn

from ahn.decode.fusion import fuse
from ahn.ops.step.product import FEW

K, N = 24, 12
Products = list[dict[str, Any]]
NAMES = {
    torch.ops.ahn.product.default: ("x", "weights", "biases", "norm", "eps", "silu", "residual"),
    torch.ops.ahn.products.default: ("x", "weights", "biases", "silu"),
    torch.ops.ahn.partial_products.default: ("x", "weight"),
    torch.ops.ahn.sum_and_norm.default: ("x", "parts", "bias", "weight", "eps"),
}


def fused(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Products]:
    """What a function gives after fusion, and the products in its graph."""
    found: Products = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        fuse(module.graph)
        module.graph.lint()
        module.recompile()
        for node in module.graph.nodes:
            if names := NAMES.get(node.target):
                found.append(dict(zip(names, node.args, strict=True)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend, dynamic=False)(*inputs), found


def vector(tokens: int = 1) -> Tensor:
    return torch.randn(1, tokens, K)


def whole_layer(
    x: Tensor, first: Tensor, q: Tensor, bias: Tensor, k: Tensor, o: Tensor, second: Tensor, gate: Tensor, up: Tensor,
    down: Tensor, last: Tensor,
) -> Tensor:  # fmt: skip
    y = norm(x, first)
    mixed = F.linear(y, q, bias) * torch.sigmoid(F.linear(y, k))
    x = x + F.linear(mixed, o)
    y = norm(x, second)
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down, last)


SHAPES = [(K,), (N, K), (N,), (N, K), (K, N), (K,), (2 * N, K), (2 * N, K), (K, 2 * N), (K,)]


def test_a_whole_layer_is_four_products() -> None:
    inputs = [vector(), *(torch.randn(shape) for shape in SHAPES)]
    found, products = fused(whole_layer, *inputs)
    assert relative_error(found, whole_layer(*inputs)) < 1e-5
    assert [len(p["weights"]) for p in products] == [2, 1, 2, 1]
    assert [p["silu"] for p in products] == [False, False, True, False]
    assert [p["norm"] is not None for p in products] == [True, False, True, False]
    assert [p["residual"] is not None for p in products] == [False, True, False, True]
    assert [p["eps"] for p in products] == [1e-6, 0.0, 1e-6, 0.0]
    assert [b is not None for b in products[0]["biases"]] == [True, False]


@pytest.mark.sample(2)
@pytest.mark.parametrize("shape", [(1, 3, K), (1, FEW, K), (5, 1, K), (2, 4, K)])
def test_a_whole_layer_of_a_few_vectors(shape: tuple[int, ...]) -> None:
    """A norm, products, products in parts, their sum with a norm, and so on: nothing else."""
    inputs = [x.bfloat16() for x in (torch.randn(shape), *(torch.randn(shape) for shape in SHAPES))]
    found, products = fused(whole_layer, *inputs)
    wanted = whole_layer(*[x.double() for x in inputs])
    # As far from float64 as torch's own chain, which rounds as often: products of random signs, so once more.
    assert relative_error(found, wanted) < 2 * relative_error(whole_layer(*inputs), wanted)
    assert found.dtype == torch.bfloat16
    assert [p["silu"] for p in products if "silu" in p] == [False, True]
    assert [len(p["weights"]) for p in products if "weights" in p] == [2, 2]
    assert [p["biases"][0] is not None for p in products if "biases" in p] == [True, False]
    between = [p for p in products if "parts" in p]
    assert [p["parts"] is not None for p in between] == [False, True, True]
    assert [p["bias"] is not None for p in between] == [False, False, True]
    assert [p["weight"] is not None for p in between] == [True, True, False]
    assert [p["eps"] for p in between] == [1e-6, 1e-6, 0.0]
    assert len(products) == 7


def _sum_in_two_norms(x: Tensor, a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = x + F.linear(x, a)
    return F.linear(norm(x, first), b) + F.linear(norm(x, second), b)


def test_a_sum_goes_through_one_norm_only() -> None:
    inputs = [x.bfloat16() for x in (vector(3), torch.randn(K, K), torch.randn(N, K), torch.randn(K), torch.randn(K))]
    found, products = fused(_sum_in_two_norms, *inputs)
    wanted = _sum_in_two_norms(*[x.double() for x in inputs])
    assert relative_error(found, wanted) < 2 * relative_error(_sum_in_two_norms(*inputs), wanted)
    between = [(p["parts"] is not None, p["weight"] is not None) for p in products if "parts" in p]
    assert sorted(between) == [(False, True), (True, False), (True, True)], "the last is the sum of both products"


def _scaled(x: Tensor, a: Tensor, w: Tensor) -> Tensor:
    return F.linear((1.0 + w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), a)


def _other_x(x: Tensor, a: Tensor, w: Tensor) -> Tensor:
    return F.linear(w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)), a)


def _cube(x: Tensor, a: Tensor, w: Tensor) -> Tensor:
    return F.linear(w * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6)), a)


def _centred(x: Tensor, a: Tensor, w: Tensor) -> Tensor:
    return F.linear(w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), a)


@pytest.mark.parametrize("near", [_scaled, _other_x, _cube, _centred])
def test_what_only_looks_like_a_norm_stays(near: Callable[..., Tensor]) -> None:
    inputs = (vector(), torch.randn(N, K), torch.randn(K))
    found, products = fused(near, *inputs)
    assert relative_error(found, near(*inputs)) < 1e-5
    assert [p["norm"] for p in products] == [None]


def _used_twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate = F.linear(x, a)
    return F.silu(gate) * F.linear(x, b) + gate


def _three(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, a)) * F.linear(x, b) * F.linear(x, b)


def _sum_of_itself(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, a)
    return y + y


def _scaled_sum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.add(x[..., :N], F.linear(x, a), alpha=2)


def _broadcast(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x[..., :1] + F.linear(x, a)


def _in_place(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x = x.clone()
    y = F.linear(x, a)
    x.add_(1)
    return y + F.linear(x, b)


def _weight_of_its_own(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, a) * F.linear(x, a * F.linear(x, b).sum())


@pytest.mark.parametrize(
    "near", [_used_twice, _three, _sum_of_itself, _scaled_sum, _broadcast, _in_place, _weight_of_its_own]
)
def test_what_cannot_be_taken_in_is_still_right(near: Callable[..., Tensor]) -> None:
    inputs = (vector(), torch.randn(N, K), torch.randn(N, K))
    found, products = fused(near, *inputs)
    assert relative_error(found, near(*inputs)) < 1e-5
    assert not any(p["silu"] for p in products)
    assert not any(p["residual"] is not None for p in products)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 1, K), torch.float32), ((1, FEW + 1, K), torch.bfloat16), ((FEW + 1, 1, K), torch.bfloat16)],
)
def test_many_vectors_and_precise_ones_stay_matrix_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    linear = nn.Linear(K, N, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    found, products = fused(lambda x: linear(x), x)
    assert torch.equal(found, linear(x)) and not products


def test_another_precision_is_a_product_of_its_own() -> None:
    def mixed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, a).float() + F.linear(x.float(), b)

    inputs = (vector().bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N, K))
    found, products = fused(mixed, *inputs)
    assert relative_error(found, mixed(*inputs)) < 1e-2
    assert [len(p["weights"]) for p in products] == [1, 1]


def test_a_norm_that_leaves_its_inputs_precision_stays() -> None:
    """A product is in its input's precision; what follows expects the norm's."""

    def near(x: Tensor, a: Tensor, w: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.linear(a * normed.to(torch.bfloat16), w)

    inputs = vector(), torch.randn(K).bfloat16(), torch.randn(N, K).bfloat16()
    y, found = fused(near, *inputs)
    assert y.dtype == torch.bfloat16 and found[0]["norm"] is None
    assert relative_error(y, near(*inputs)) < 2**-8  # both are rounded to bfloat16 once
