"""Whether the AHN tensors of a checkpoint are the ones its settings ask for: names, shapes and finite values."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ahn import memory
from ahn.checkpoint.directory import Checkpoint, short_name
from ahn.checkpoint.stream import read_tensor
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.memory.key_basis import REMEDY, check_bases
from ahn.shape import ModelShape


def expected_shapes(shape: ModelShape, settings: AHNConfig) -> dict[str, tuple[int, ...]]:
    """Short name and shape of every tensor that an adapter with these settings has on a base of this shape."""
    wanted: dict[str, tuple[int, ...]] = {}
    for index in shape.memory_layers(settings.full_attention_layers):
        with torch.device("meta"):
            module = memory.make(settings, shape, index)
        layer = {f"ahn.fn.{name}": tuple(parameter.shape) for name, parameter in module.named_parameters()}
        if settings.router and isinstance(module, memory.RecurrentMemory):
            layer |= {f"ahn_router.{name}": (shape.heads,) for name in ("alpha", "beta")}
        wanted |= {f"layers.{index}.{name}": size for name, size in layer.items()}
    return wanted


def check_tensors(checkpoint: Checkpoint, shape: ModelShape, settings: AHNConfig) -> None:
    """Compare names and shapes with those of an AHN of these settings on a base of this shape."""
    wanted = expected_shapes(shape, settings)
    found = {short_name(name): entry.shape for name, entry in checkpoint.ahn_tensors.items()}
    what = f"{checkpoint.path} ({settings.memory}, {shape.layers} layers)"
    if len(found) != len(checkpoint.ahn_tensors):
        raise AHNError(f"{what} holds AHN tensors of more than one decoder.")
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        raise AHNError(f"{what} lacks {len(missing)} of {len(wanted)} AHN tensors, the first is {missing[0]}.")
    if extra:
        raise AHNError(f"{what} has {len(extra)} AHN tensors that it should not have, the first is {extra[0]}.")
    wrong = [name for name, size in wanted.items() if found[name] != size]
    if wrong:
        name = wrong[0]
        raise AHNError(f"{what}: {name} has shape {found[name]} instead of {wanted[name]} ({len(wrong)} such tensors).")


def finite_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every AHN tensor with its short name, one at a time, in its stored dtype."""
    for name, entry in checkpoint.ahn_tensors.items():
        tensor = read_tensor(entry)
        if not tensor.isfinite().all():
            raise AHNError(f"{checkpoint.path}: {name} holds NaN or infinite values, the adapter is unusable.")
        yield short_name(name), tensor


def check_values(checkpoint: Checkpoint) -> None:
    """Read every AHN tensor once; none is kept but those of bases, which are small.

    Raises:
        AHNError: as `finite_tensors`, or keys cannot be coded in a basis.
    """
    bases = {name: tensor for name, tensor in finite_tensors(checkpoint) if ".key_basis." in name}
    check_bases(bases, str(checkpoint.path), REMEDY)
