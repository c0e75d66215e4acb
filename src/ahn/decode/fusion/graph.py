"""What a decoder layer's graph of torch functions is made of, found whichever way it is written."""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

MUL, ADD = (operator.mul, torch.mul, "mul"), (operator.add, torch.add, "add")
_SQUARE, _POWER, _MEAN = (torch.square, "square"), (operator.pow, torch.pow, "pow"), (torch.mean, "mean")
_RSQRT, _CAST = (torch.rsqrt, "rsqrt"), ("to", "float")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


class Norm(NamedTuple):
    """`weight · x / sqrt(mean(x²) + eps)`."""

    x: fx.Node
    weight: fx.Node | None
    eps: float


def find_norm(node: Any) -> Norm | None:
    """RMSNorm with a weight, computed in any precision and rounded anywhere, but in the end to that of its x."""
    for weight, scaled in either(node, MUL):
        if not is_input(weight) or value(weight).dim() != 1:
            continue
        for wide, inverse in either(uncast(scaled, to_any=True), MUL):
            for mean, eps in either(argument_of(inverse, _RSQRT), ADD):
                x = uncast(wide, to_any=True)
                squares = _mean_over_features(mean)
                of_x = squares is not None and uncast(_squared(squares), to_any=True) is x
                if of_x and isinstance(eps, float) and alike(node, x):
                    return Norm(x, weight, eps)
    return None


def _mean_over_features(node: Any) -> Any:
    """x of `x.mean(-1, keepdim=True)`."""
    if not is_call(node, _MEAN) or argument(node, 1, "dim") not in (-1, [-1], (-1,)):
        return None
    return node.args[0] if argument(node, 2, "keepdim") is True else None


def _squared(node: Any) -> Any:
    """x of `x²`."""
    if is_call(node, _SQUARE):
        return node.args[0]
    return node.args[0] if is_call(node, _POWER) and node.args[1] == 2 else None


def alike(a: fx.Node, b: fx.Node) -> bool:
    return value(a).shape == value(b).shape and value(a).dtype == value(b).dtype


def either(node: Any, targets: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Both orders of the two arguments of a plain sum or product; nothing for any other node."""
    if not is_call(node, targets) or node.kwargs or len(node.args) != 2:
        return []
    return [(node.args[0], node.args[1]), (node.args[1], node.args[0])]


def uncast(node: Any, to_any: bool = False) -> Any:
    """What a node is before it was cast, to its own precision or to any."""
    while is_call(node, _CAST) and (to_any or alike(node, node.args[0])):
        node = node.args[0]
    return node


def is_call(node: Any, targets: tuple[Any, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def argument_of(node: Any, targets: tuple[Any, ...]) -> Any:
    return node.args[0] if is_call(node, targets) else None


def is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in _IN_PLACE or node.kwargs.get("inplace") is True


def argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def value(node: Any) -> Tensor:
    """The fake tensor that stands for a node."""
    value: Tensor = node.meta["example_value"]
    return value
