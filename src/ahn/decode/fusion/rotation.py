"""RoPE of queries and keys, and the norms of their heads before it, become a part of `ahn.ops.step`.

A base model rotates before it calls an attention function. Left to a kernel of its own, that costs a launch per layer,
and one that cannot begin before its predecessor has ended (see `ahn.ops.step.dependent_launch`).
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

import ahn.ops.step.operator
import ahn.ops.step.several  # noqa: F401  (registers an operator, as the line before)
from ahn import private
from ahn.decode.fusion.graph import ADD, MUL, argument, either, find_norm, is_call, value
from ahn.ops.step.reference import by_steps

_NEGATIVE, _CAT = (operator.neg, torch.neg, "neg"), (torch.cat, torch.concat)
_TOKEN = (slice(None), slice(None), 0)  # of (B, H, 1, P)
_STEP, _SEVERAL = torch.ops.ahn.step, torch.ops.ahn.several


class _Rotated(NamedTuple):
    """`x · cos + cat(-second half of x, first half of x) · sin`, x (B, H, N, P)."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


class _Head(NamedTuple):
    """A query or key (B, H, N, P) before its norm, if it has one, and its rotation."""

    x: fx.Node
    norm: fx.Node | None
    eps: float


def fuse_rotation(graph: fx.Graph) -> None:
    """Rewrite the graph in place; what is of no use any more stays in it."""
    for node in graph.nodes:
        if node.target is _STEP.default:
            _take_in(graph, node, _STEP)
        elif node.target is _SEVERAL.default:
            _take_in(graph, node, _SEVERAL)


def _take_in(graph: fx.Graph, step: fx.Node, operator_of: Any) -> None:
    """Let a step rotate by itself, where all its queries are one and its key is rotated as they are."""
    names, single = private.argument_names(operator_of), operator_of is _STEP
    at = {name: names.index(name) for name in ("query", "key", "memory_query")}
    if not single:
        routed = step.args[names.index("query_map")] is not None
        if not by_steps(value(step.args[at["query"]]).shape[2], routed):
            return
    given = {name: step.args[place] for name, place in at.items() if step.args[place] is not None}
    heads = {name: _token_of(node) if single else node for name, node in given.items()}
    query, key = (_rotated(heads[name]) for name in ("query", "key"))
    if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
        return
    if heads.get("memory_query", heads["query"]) is not heads["query"]:
        return
    with graph.inserting_before(step):
        before = {"query": _before_norm(graph, query.x), "key": _before_norm(graph, key.x)}
        before["memory_query"] = before["query"]
        for name in heads:
            x = before[name].x
            step.update_arg(at[name], graph.call_function(operator.getitem, (x, _TOKEN)) if single else x)
    turn: dict[str, Any] = {"cos": query.cos, "sin": query.sin}
    for name in ("query", "key"):
        turn |= {f"{name}_norm": before[name].norm, f"{name}_eps": before[name].eps}
    step.kwargs = {**step.kwargs, **turn}


def _token_of(node: Any) -> Any:
    """x of `x[:, :, 0]`."""
    return node.args[0] if is_call(node, (operator.getitem,)) and node.args[1] == _TOKEN else None


def _rotated(node: Any) -> _Rotated | None:
    for plain, turned in either(node, ADD):
        for x, cos in either(plain, MUL):
            for other, sin in either(turned, MUL):
                same = isinstance(x, fx.Node) and x is _before_half_turn(other)
                if same and _for_tokens(cos, x) and _for_tokens(sin, x):
                    return _Rotated(x, cos, sin)
    return None


def _before_half_turn(node: Any) -> Any:
    """x of `cat(-second half of x, first half of x)`."""
    if not is_call(node, _CAT) or argument(node, 1, "dim") != -1 or len(node.args[0]) != 2:
        return None
    negative, first = node.args[0]
    second: Any = negative.args[0] if is_call(negative, _NEGATIVE) else None
    if not is_call(first, (operator.getitem,)) or not is_call(second, (operator.getitem,)):
        return None
    x = first.args[0]
    half = value(x).shape[-1] // 2
    halves = first.args[1] == (..., slice(None, half)) and second.args[1] == (..., slice(half, None))
    return x if halves and second.args[0] is x and value(x).shape[-1] == 2 * half else None


def _for_tokens(turn: Any, x: fx.Node) -> bool:
    """Whether cos or sin is P numbers for each token, of each row or of all, of x (B, H, N, P)."""
    if not isinstance(turn, fx.Node) or value(x).dim() != 4 or value(turn).dim() != 4:
        return False
    (B, _, N, P), (rows, *rest) = value(x).shape, value(turn).shape
    return rows in (1, B) and rest == [1, N, P]


def _before_norm(graph: fx.Graph, x: fx.Node) -> _Head:
    """Through a norm over each head, which stands before heads and tokens change places."""
    swapped = is_call(x, ("transpose",)) and tuple(x.args[1:]) in ((1, 2), (2, 1))
    norm = find_norm(x.args[0]) if swapped else None
    if norm is None or norm.weight is None or value(norm.weight).shape != value(x).shape[-1:]:
        return _Head(x, None, 0.0)
    return _Head(graph.call_method("transpose", (norm.x, 1, 2)), norm.weight, norm.eps)
