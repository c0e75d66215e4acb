"""Every linear map of a single token, or of a few tokens or rows, becomes an operator of `ahn.ops.step.product`.

Maps of the same vectors together, with `silu(gate) · up` between two of them. Of a single vector also with the RMSNorm
before them and the sum that adds one to the residual stream; of several, that sum, of the parts in which the map comes,
and the norm after it are one operator more.
"""

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from ahn import private
from ahn.decode.fusion.graph import (
    ADD,
    MUL,
    Norm,
    alike,
    argument,
    argument_of,
    either,
    find_norm,
    is_call,
    is_input,
    only_user,
    uncast,
    value,
)
from ahn.ops.step.product import FEW

_SUM_AND_NORM = torch.ops.ahn.sum_and_norm.default


class _Gated(NamedTuple):
    """`silu(gate) · up`, the whole being `node`."""

    node: fx.Node
    gate: fx.Node
    up: fx.Node


class _Added(NamedTuple):
    """`residual + linear`, the whole being `node`."""

    node: fx.Node
    residual: fx.Node


def fuse_products(graph: fx.Graph) -> None:
    """Rewrite the graph in place; what is of no use any more stays in it."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if _of_few_vectors(node):
            groups.setdefault(uncast(node.args[0]), []).append(node)
    for linears in groups.values():
        replace = _replace if _vectors(linears[0]) == 1 else _replace_several
        replace(graph, linears, _gated(linears), _added(linears))


def _replace(graph: fx.Graph, linears: list[fx.Node], gated: _Gated | None, added: _Added | None) -> None:
    """All linear maps of one vector by one operator, which takes in what it can."""
    root = uncast(linears[0].args[0])  # now, when what came before has been replaced
    norm = find_norm(root) or Norm(root, None, 0.0)
    if gated is not None:
        linears = [gated.gate, gated.up]
    # Where the first of them stands, x is known, and the weights are inputs; a residual may be known later.
    place = linears[0] if added is None else added.node
    with graph.inserting_before(place if gated is None else gated.node):
        weights, biases = _inputs(linears)
        residual = None if added is None else added.residual
        product = torch.ops.ahn.product.default
        y = graph.call_function(product, (norm.x, weights, biases, norm.weight, norm.eps, gated is not None, residual))
        _stand_in_for_all(graph, linears, gated or added, y)


def _replace_several(graph: fx.Graph, linears: list[fx.Node], gated: _Gated | None, added: _Added | None) -> None:
    """All linear maps of the same few vectors by one operator."""
    if gated is not None:
        linears = [gated.gate, gated.up]
    _replace_norm(graph, uncast(linears[0].args[0]))
    x, (weights, biases) = uncast(linears[0].args[0]), _inputs(linears)
    place = linears[0] if added is None else added.node
    with graph.inserting_before(place if gated is None else gated.node):
        if added is None:
            y = graph.call_function(torch.ops.ahn.products.default, (x, weights, biases, gated is not None))
            _stand_in_for_all(graph, linears, gated, y)
            return
        y = graph.call_function(torch.ops.ahn.partial_products.default, (x, weights[0]))
        both = graph.call_function(_SUM_AND_NORM, (added.residual, y, biases[0], None, 0.0))
        y = graph.call_function(operator.getitem, (both, 0))
        y.meta.update(added.node.meta)
        added.node.replace_all_uses_with(y)


def _replace_norm(graph: fx.Graph, normed: fx.Node) -> None:
    """A norm of few vectors goes with the sum before it, if that is an operator of ours, or becomes one itself."""
    norm = find_norm(normed)
    if norm is None:
        return
    before = argument_of(norm.x, (operator.getitem,))
    if is_call(before, (_SUM_AND_NORM,)) and before.args[3] is None:
        both = before
        both.args = (*both.args[:3], norm.weight, norm.eps)
    else:
        with graph.inserting_before(normed):
            both = graph.call_function(_SUM_AND_NORM, (norm.x, None, None, norm.weight, norm.eps))
    with graph.inserting_before(normed):
        y = graph.call_function(operator.getitem, (both, 1))
        y.meta.update(normed.meta)
        normed.replace_all_uses_with(y)


def _inputs(linears: list[fx.Node]) -> tuple[list[Any], list[Any]]:
    """Weights and biases of linear maps."""
    weights, biases = ([argument(x, at, name) for x in linears] for at, name in ((1, "weight"), (2, "bias")))
    return weights, biases


def _stand_in_for_all(graph: fx.Graph, linears: list[fx.Node], whole: _Gated | _Added | None, y: fx.Node) -> None:
    """Put y in the place of the node that it is the whole of, or its parts in the places of linear maps."""
    if whole is not None:
        _stand_in(graph, whole.node, y)
        return
    begin = 0
    for linear in linears:
        count = value(linear).numel()
        _stand_in(graph, linear, graph.call_method("narrow", (y, 0, begin, count)))
        begin += count


def _stand_in(graph: fx.Graph, node: fx.Node, y: fx.Node) -> None:
    """Put y, in the shape of a node, into the node's place."""
    new = graph.call_method("view", (y, tuple(value(node).shape)))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)


def _vectors(linear: fx.Node) -> int:
    return math.prod(value(linear.args[0]).shape[:-1])


def _of_few_vectors(node: fx.Node) -> bool:
    """A linear map of a few vectors, by a matrix that is an input of the graph and in their precision.

    In float32 several vectors stay a matrix product: tensor cores have no such precision.
    """
    if node.target not in private.LINEAR:
        return False
    x, *rest = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    if _vectors(node) > (FEW if value(x).dtype.itemsize == 2 else 1):
        return False
    parts = [part for part in rest if part is not None]
    return all(is_input(part) and value(part).dtype == value(x).dtype for part in parts)


def _gated(linears: list[fx.Node]) -> _Gated | None:
    if len(linears) != 2 or value(linears[0]).shape != value(linears[1]).shape:
        return None
    for gate, up in (linears, linears[::-1]):
        active = only_user(gate)
        if active is None or active.target not in private.SILU or only_user(up) is None:
            continue
        whole = only_user(active)
        if whole is not None and whole is only_user(up) and is_call(whole, MUL):
            return _Gated(whole, gate, up)
    return None


def _added(linears: list[fx.Node]) -> _Added | None:
    whole = only_user(linears[0]) if len(linears) == 1 else None
    if whole is None:
        return None
    for linear, residual in either(whole, ADD):
        other = isinstance(residual, fx.Node) and residual is not linear
        if linear is linears[0] and other and alike(residual, linear):
            return _Added(whole, residual)
    return None
