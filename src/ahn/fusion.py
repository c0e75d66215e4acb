"""Products of one vector in the graph of a decoder layer, with what surrounds them, as single operators.

torch.compile hands over what a layer computes; here every linear map of a single token becomes `ahn.ops.product`:
maps of the same vector together, with the RMSNorm before them, with `silu(gate) · up` between two of them, and with the
sum that adds one to the residual stream. What a layer does otherwise stays as it is, so a model that is written in
another way loses a fusion and nothing else.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import ahn.ops.product  # noqa: F401  (registers the operator)

_LINEAR, _SILU = (F.linear, torch._C._nn.linear), (F.silu, torch._C._nn.silu)
_MUL, _ADD = (operator.mul, torch.mul, "mul"), (operator.add, torch.add, "add")
_SQUARE, _POWER, _MEAN = (torch.square, "square"), (operator.pow, torch.pow, "pow"), (torch.mean, "mean")
_RSQRT, _CAST = (torch.rsqrt, "rsqrt"), ("to", "float")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


class _Norm(NamedTuple):
    """`weight · x / sqrt(mean(x²) + eps)`."""

    x: fx.Node
    weight: fx.Node | None
    eps: float


class _Gated(NamedTuple):
    """`silu(gate) · up`, the whole being `node`."""

    node: fx.Node
    gate: fx.Node
    up: fx.Node


class _Added(NamedTuple):
    """`residual + linear`, the whole being `node`."""

    node: fx.Node
    residual: fx.Node


def fuse(graph: fx.Graph) -> None:
    """Rewrite a graph of torch functions, as Dynamo gives it to a backend, in place.

    A graph that changes tensors in place (other than by an operator of ours, on its own buffers) is left alone: there,
    what is computed of a tensor depends on when.
    """
    if any(_in_place(node) for node in graph.nodes):
        return
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if _of_one_vector(node):
            groups.setdefault(_uncast(node.args[0]), []).append(node)
    for linears in groups.values():
        _replace(graph, linears)
    graph.eliminate_dead_code()


def _replace(graph: fx.Graph, linears: list[fx.Node]) -> None:
    """All linear maps of one vector by one operator, which takes in what it can."""
    root = _uncast(linears[0].args[0])  # now, when what came before has been replaced
    norm = _norm(root) or _Norm(root, None, 0.0)
    gated, added = _gated(linears), _added(linears)
    if gated is not None:
        linears = [gated.gate, gated.up]
    # Where the first of them stands, x is known, and the weights are inputs; a residual may be known later.
    place = linears[0] if added is None else added.node
    with graph.inserting_before(place if gated is None else gated.node):
        weights, biases = ([_argument(x, at, name) for x in linears] for at, name in ((1, "weight"), (2, "bias")))
        residual = None if added is None else added.residual
        product = torch.ops.ahn.product.default
        y = graph.call_function(product, (norm.x, weights, biases, norm.weight, norm.eps, gated is not None, residual))
        whole = gated or added
        if whole is not None:
            _stand_in(graph, whole.node, y)
            return
        begin = 0
        for linear in linears:
            count = _value(linear).shape[-1]
            _stand_in(graph, linear, graph.call_method("narrow", (y, 0, begin, count)))
            begin += count


def _stand_in(graph: fx.Graph, node: fx.Node, y: fx.Node) -> None:
    """Put y, in the shape of a node, into the node's place."""
    new = graph.call_method("view", (y, tuple(_value(node).shape)))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)


def _of_one_vector(node: fx.Node) -> bool:
    """A linear map of a single row, by a matrix that is an input of the graph and in the row's precision."""
    if node.target not in _LINEAR:
        return False
    x, *rest = node.args[0], _argument(node, 1, "weight"), _argument(node, 2, "bias")
    if _value(x).numel() != _value(x).shape[-1]:
        return False
    parts = [part for part in rest if part is not None]
    return all(_is_input(part) and _value(part).dtype == _value(x).dtype for part in parts)


def _norm(node: fx.Node) -> _Norm | None:
    """RMSNorm with a weight, computed in any precision and rounded anywhere."""
    for weight, scaled in _either(node, _MUL):
        if not _is_input(weight) or _value(weight).dim() != 1:
            continue
        for wide, inverse in _either(_uncast(scaled, to_any=True), _MUL):
            for mean, eps in _either(_argument_of(inverse, _RSQRT), _ADD):
                x = _uncast(wide, to_any=True)
                squares = _mean_over_features(mean)
                if isinstance(eps, float) and squares is not None and _uncast(_squared(squares), to_any=True) is x:
                    return _Norm(x, weight, eps)
    return None


def _mean_over_features(node: Any) -> Any:
    """x of `x.mean(-1, keepdim=True)`."""
    if not _is(node, _MEAN) or _argument(node, 1, "dim") not in (-1, [-1], (-1,)):
        return None
    return node.args[0] if _argument(node, 2, "keepdim") is True else None


def _squared(node: Any) -> Any:
    """x of `x²`."""
    if _is(node, _SQUARE):
        return node.args[0]
    return node.args[0] if _is(node, _POWER) and node.args[1] == 2 else None


def _gated(linears: list[fx.Node]) -> _Gated | None:
    if len(linears) != 2 or _value(linears[0]).shape != _value(linears[1]).shape:
        return None
    for gate, up in (linears, linears[::-1]):
        active = _only_user(gate)
        if active is None or active.target not in _SILU or _only_user(up) is None:
            continue
        whole = _only_user(active)
        if _is(whole, _MUL) and whole is _only_user(up):
            return _Gated(whole, gate, up)
    return None


def _added(linears: list[fx.Node]) -> _Added | None:
    whole = _only_user(linears[0]) if len(linears) == 1 else None
    for linear, residual in _either(whole, _ADD):
        other = isinstance(residual, fx.Node) and residual is not linear
        if linear is linears[0] and other and _alike(residual, linear):
            return _Added(whole, residual)
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return _value(a).shape == _value(b).shape and _value(a).dtype == _value(b).dtype


def _either(node: Any, targets: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Both orders of the two arguments of a plain sum or product; nothing for any other node."""
    if not _is(node, targets) or node.kwargs or len(node.args) != 2:
        return []
    return [(node.args[0], node.args[1]), (node.args[1], node.args[0])]


def _uncast(node: Any, to_any: bool = False) -> Any:
    """What a node is before it was cast, to its own precision or to any."""
    while _is(node, _CAST) and (to_any or _alike(node, node.args[0])):
        node = node.args[0]
    return node


def _is(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _argument_of(node: Any, targets: tuple[Any, ...]) -> Any:
    return node.args[0] if _is(node, targets) else None


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _IN_PLACE or node.kwargs.get("inplace") is True


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _value(node: Any) -> Tensor:
    """The fake tensor that stands for a node."""
    value: Tensor = node.meta["example_value"]
    return value
