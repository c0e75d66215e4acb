"""In which basis a layer's keys are coded (`AHNConfig.calibrated_keys`): what an adapter holds of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ahn.errors import AHNError
from ahn.ops.basis import Basis
from ahn.ops.quantize import precise
from ahn.private import times_written

WORST = 1e5
"""Condition number of a matrix that is still inverted: float32 then keeps two digits of what it decodes."""


class KeyBasis(nn.Module):
    """`ahn.ops.basis.Basis` of a layer as parameters, in any precision; no gradient is taken.

    A new one is all zeros, which nothing can be coded with: `ahn.training.calibration` or an adapter fills it.

    Attributes:
        weight: (Hkv, P, P), `Basis.analysis`.
        deviations: (Hkv, P).
    """

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kv_heads, head_dim, head_dim), requires_grad=False)
        self.deviations = nn.Parameter(torch.zeros(kv_heads, head_dim), requires_grad=False)
        self._made: tuple[Tensor, Tensor, int, torch.dtype, Basis] | None = None

    def basis(self, dtype: torch.dtype) -> Basis:
        """For keys of this type, with the inverse, which is worked out once for the numbers that are there.

        Raises:
            AHNError: nothing has been calibrated.
        """
        weight, deviations, kind = self.weight.detach(), self.deviations.detach(), precise(dtype)
        version = times_written(weight) + times_written(deviations)
        if self._made is not None:
            # The tensors are held: no other can have come to lie where they are.
            own, own_deviations, *made, basis = self._made
            same = (own.data_ptr(), own_deviations.data_ptr()) == (weight.data_ptr(), deviations.data_ptr())
            if same and made == [version, kind]:
                return basis
        if reason := unfit(weight, deviations):
            raise AHNError(f"Keys cannot be coded: their basis {reason}. {REMEDY}")
        with torch.inference_mode(False), torch.no_grad():
            basis = Basis.of(*(x.clone().to(kind) for x in (weight, deviations)))
        self._made = weight, deviations, version, kind, basis
        return basis


REMEDY = (
    "With calibrated_keys load an adapter that holds it, or make one with ahn.training.calibration; or use "
    "calibrated_keys=False."
)


def unfit(weight: Tensor, deviations: Tensor) -> str | None:
    """Why (Hkv, P, P) and (Hkv, P) are no basis to code keys in; None if they are."""
    if not (bool(weight.isfinite().all()) and bool(deviations.isfinite().all())):
        return "holds NaN or infinite values"
    if not bool(weight.any()):
        return "has not been calibrated"
    if not bool((deviations > 0).all()):
        return "has deviations that are not positive"
    if not bool((torch.linalg.cond(weight.double().cpu()) < WORST).all()):
        return "cannot be inverted"
    return None


def check_bases(tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Raises AHNError, in the words given, if keys cannot be coded in a basis among the tensors of an AHN, by name."""
    for name, weight in tensors.items():
        if name.endswith("key_basis.weight"):
            basis = name.removesuffix(".weight")
            if reason := unfit(weight, tensors[f"{basis}.deviations"]):
                raise AHNError(f"{where}: {basis} {reason}, keys cannot be coded in it. {remedy}")


SAVE_ANOTHER = (
    "Calibrate it before it is saved (ahn.training.calibration.calibrate), or attach with calibrated_keys=False."
)
"""The remedy where a model is saved."""
