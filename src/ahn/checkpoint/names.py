"""Names of AHN tensors: `model.layers.{i}.ahn.fn.{parameter}` and `model.layers.{i}.ahn_router.{alpha,beta}`."""

from __future__ import annotations

import re

import torch

from ahn import memory
from ahn.config import AHNConfig
from ahn.shape import ModelShape

AHN_NAME = re.compile(r"(?:^|.*\.)(layers\.\d+\.(?:ahn|ahn_router)\..+)")


def is_ahn(name: str) -> bool:
    """Whether a tensor of this name belongs to a memory or its router."""
    return AHN_NAME.fullmatch(name) is not None


def short_name(name: str) -> str:
    """`layers.{i}.ahn…` without what comes before: multimodal models nest their decoder deeper than text models."""
    match = AHN_NAME.fullmatch(name)
    return match[1] if match else name


def expected_shapes(shape: ModelShape, settings: AHNConfig) -> dict[str, tuple[int, ...]]:
    """Short name and shape of every tensor that an adapter with these settings has on a base of this shape."""
    with torch.device("meta"):
        module = memory.make(settings, shape)
    layer = {f"ahn.fn.{name}": tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if settings.router and isinstance(module, memory.RecurrentMemory):
        layer |= {f"ahn_router.{name}": (shape.heads,) for name in ("alpha", "beta")}
    layers = shape.memory_layers(settings.full_attention_layers)
    return {f"layers.{i}.{name}": size for i in layers for name, size in layer.items()}
