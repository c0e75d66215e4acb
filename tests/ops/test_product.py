"""Products of one vector and of a few: the kernel against plain torch, plain torch against torch's modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.effort import examples
from support.kernels import DEVICE, INTERPRETED

from ahn.ops.step.product import _ROWS, FEW, partial_products, parts, product, products, reference, sum_and_norm

# Float32: sums of up to 300 terms in another order.
FLOAT32 = 1e-5


def test_the_plain_form_is_a_layers_own_chain() -> None:
    x, norm = torch.randn(1, 1, 24), torch.rand(24)
    first, second, bias, residual = torch.randn(5, 24), torch.randn(5, 24), torch.randn(5), torch.randn(1, 1, 5)
    normed = F.rms_norm(x, (24,), norm, eps=1e-5)
    gated = F.silu(F.linear(normed, first, bias)) * F.linear(normed, second) + residual
    found = product(x, [first, second], [bias, None], norm, 1e-5, True, residual)
    assert relative_error(found, gated.flatten()) < FLOAT32
    chained = torch.cat([F.linear(x, first), F.linear(x, second, bias)], -1).flatten()
    assert relative_error(product(x, [first, second], [None, bias], None, 0.0, False, None), chained) < FLOAT32


def in_poison(r: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal numbers inside a larger buffer of NaN, so that a read beyond the end shows."""
    room = torch.full((shape[0] + 8, *shape[1:]), torch.nan)
    room[: shape[0]] = torch.randn(*shape, generator=r)
    return room.to(DEVICE)[: shape[0]]


@pytest.mark.usefixtures("triton")
@given(data=st.data())
@settings(max_examples=examples(5, 25) if INTERPRETED else 10)
def test_the_kernel_is_the_plain_form(data: st.DataObject) -> None:
    from ahn.ops.step import product_kernel

    r = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    K, silu = data.draw(st.integers(1, 300)), data.draw(st.booleans())
    tile = product_kernel.Tile(data.draw(st.sampled_from([1, 4])), data.draw(st.sampled_from([64, 512])), 8, None)
    sizes = data.draw(st.lists(st.integers(1, 37), min_size=1, max_size=6))
    sizes = [sizes[0]] * 2 if silu else sizes

    def made(*shape: int) -> torch.Tensor:
        return in_poison(r, *shape)

    weights = [made(size, K) for size in sizes]
    biases = [made(size) if data.draw(st.booleans()) else None for size in sizes]
    norm = made(K) if data.draw(st.booleans()) else None
    residual = made(sizes[0] if silu else sum(sizes)) if data.draw(st.booleans()) else None
    arguments = (made(K), weights, biases, norm, 1e-5, silu, residual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product_kernel, "tile", lambda K, silu: tile)
        found = product_kernel.product(*arguments)
    assert relative_error(found.cpu(), reference(*arguments).cpu()) < FLOAT32


def test_several_vectors_are_one_after_another() -> None:
    x, residual = torch.randn(1, 3, 24), torch.randn(3, 5)
    weights, biases = [torch.randn(5, 24), torch.randn(5, 24)], [torch.randn(5), None]
    for silu in (False, True):
        each = torch.stack([product(x[:, i], weights, biases, None, 0.0, silu, None) for i in range(3)])
        apart = torch.cat([own.flatten() for own in each.split(5, 1)])
        assert relative_error(products(x, weights, biases, silu), apart) < FLOAT32
    whole = partial_products(x, weights[0]).sum(0) + residual
    assert relative_error(whole, reference(x, weights[:1], [None], None, 0.0, False, residual)) < FLOAT32


@pytest.mark.parametrize(("shape", "count"), [((2048, 2048), 4), ((2048, 11008), 8), ((2, 100), 1), ((22016, 2048), 1)])
def test_parts_keep_a_gpu_busy(shape: tuple[int, int], count: int) -> None:
    """Of the two last matrices of a layer of Qwen2.5-3B, for 132 multiprocessors; short and long ones stay whole."""
    assert parts(torch.empty(shape)) == count


@pytest.mark.usefixtures("triton")
@given(data=st.data())
@settings(max_examples=examples(4, 25) if INTERPRETED else 10)
def test_the_kernels_of_several_vectors_are_the_plain_form(data: st.DataObject) -> None:
    from ahn.ops.step import few_vectors_kernel

    assert few_vectors_kernel.ROWS == _ROWS, "what parts are counted for"
    r = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    K, silu, vectors = data.draw(st.integers(1, 300)), data.draw(st.booleans()), data.draw(st.integers(1, FEW))
    sizes = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    sizes = [sizes[0]] * 2 if silu else sizes
    x, weights = in_poison(r, vectors, K), [in_poison(r, size, K) for size in sizes]
    biases = [in_poison(r, size) if data.draw(st.booleans()) else None for size in sizes]
    rounds = data.draw(st.sampled_from([64, 256]))
    found = few_vectors_kernel.products(x, weights, biases, silu, rounds)
    plain = products(x.cpu(), [w.cpu() for w in weights], [None if b is None else b.cpu() for b in biases], silu)
    assert relative_error(found.cpu(), plain) < FLOAT32
    found = few_vectors_kernel.partial_products(x, weights[0], data.draw(st.integers(1, 5)), rounds).sum(0)
    assert relative_error(found.cpu(), reference(x, weights[:1], [None], None, 0.0, False, None).cpu()) < FLOAT32


@pytest.mark.usefixtures("triton", "poisoned")
@given(data=st.data())
@settings(
    max_examples=examples(5, 25) if INTERPRETED else 10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_kernel_between_products_is_the_plain_form(data: st.DataObject) -> None:
    from ahn.ops.step import few_vectors_kernel

    r = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    N, vectors, count = data.draw(st.integers(1, 300)), data.draw(st.integers(1, FEW)), data.draw(st.integers(0, 8))
    x, every = in_poison(r, vectors, N)[:, None], in_poison(r, count, vectors, N) if count else None
    bias = in_poison(r, N) if count and data.draw(st.booleans()) else None
    weight = in_poison(r, N) if not count or data.draw(st.booleans()) else None
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    given = [None if part is None else part.to(dtype) for part in (x, bias, weight)]
    arguments = given[0], every, *given[1:], 1e-5
    found = few_vectors_kernel.sum_and_norm(*arguments)
    plain = sum_and_norm(*(part.cpu() if isinstance(part, torch.Tensor) else part for part in arguments))
    for one, other, wanted in zip(found, plain, (count > 0, weight is not None), strict=True):
        assert one.shape == other.shape == (x.shape if wanted else (0,))
        # In bfloat16 sums in another order may be rounded to the other neighbour, and so again after the norm.
        torch.testing.assert_close(
            one.cpu(), other, **({} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-2})
        )


def test_between_products_stand_torchs_own_sum_and_norm() -> None:
    x, bias, weight, every = torch.randn(1, 3, 24), torch.randn(24), torch.rand(24), torch.randn(2, 3, 24)
    total, normed = sum_and_norm(x, every, bias, weight, 1e-5)
    torch.testing.assert_close(total, x + every.sum(0) + bias)
    torch.testing.assert_close(normed, F.rms_norm(total, (24,), weight, eps=1e-5))
    torch.testing.assert_close(sum_and_norm(x, None, None, weight, 1e-5)[1], F.rms_norm(x, (24,), weight, eps=1e-5))
