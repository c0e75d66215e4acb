"""What every memory is: gates that decide a write, a recurrent state, a scan over evicted tokens, and a read-out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ahn.layout.anchored import Anchored
from ahn.layout.evicted import Evicted
from ahn.layout.visibility import Visibility
from ahn.memory.key_basis import KeyBasis
from ahn.memory.share import WHOLE, Share
from ahn.ops.gate import Gate
from ahn.ops.routes import Routes
from ahn.ops.rule import StepRule
from ahn.shape import DEFAULT_SLOTS, EXACT

INIT_STD = 0.02


class HeadLinear(nn.Module):
    """One (P, P) matrix per head: `y[h] = x[h] @ weight[h]`, x (B, H, N, P)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.to(self.weight.dtype), self.weight)


@dataclasses.dataclass
class SeenKeys:
    """Keys that some queries of a forward see besides sinks and window.

    Attributes:
        first, last: of the queries, and one beyond.
        key, value: (B, Hkv, C, P).
        visible: (B or 1, 1 or Hkv, last - first, C') bool, which of the queries sees which of the last C' of them; all
            see those before.
        bias: (B or 1, last - first) float32, added to the scores of all these keys; None for nothing.
        heads: (h,) the key heads that see them, where `key`, `value` and `visible` are of these alone; None for all.
    """

    first: int
    last: int
    key: Tensor
    value: Tensor
    visible: Tensor
    bias: Tensor | None = None
    heads: Tensor | None = None


@dataclasses.dataclass
class MemoryKeys:
    """Keys that exact attention sees besides sinks and window, made by a memory of what left.

    Attributes:
        pieces: all new queries, in order.
        state: of the memory after the last write.
    """

    pieces: list[SeenKeys]
    state: dict[str, Tensor]


class Memory(nn.Module):
    """What becomes of tokens that leave the window. This class forgets them; a subclass overrides what it needs.

    Shapes: B batch, n new tokens, m evicted ones, D hidden size, H query heads, Hkv key/value heads, Hw heads that
    write (`write_heads`), P head dim.

    Args:
        hidden_size: D.
        heads: H.
        head_dim: P.
        kv_heads: Hkv; None where every query head has a key head.
        q_proj: give a recurrent memory its own per-head projection of the query (docs/spec.md, section 3).
        slots: tokens per key head that a memory holds which keeps tokens; others have no use for it.
        bits: likewise, per number of these tokens' keys and values: 2, 3, 4, or `EXACT`.
        slot_heads: likewise, the key heads that keep tokens; None for all.
        passage: likewise, how many tokens are kept or forgotten together.
        scores: likewise, by what: each key head's "own" scores, one for all heads that is "made" here, or one that is
            "given" by another layer.
    """

    name: ClassVar[str]
    """The name in `AHNConfig.memory`."""
    published_name: ClassVar[str | None] = None
    """The name in published checkpoints (`_ahn_implementation`); None for what has no parameters."""
    closed_gates: ClassVar[dict[str, float]] = {}
    """For each write gate, the value at which a token leaves the state untouched."""

    sees_positions: ClassVar[bool] = False
    """What it writes and reads depends on where a token stands, and not on the distances between tokens alone."""
    moves_keys: ClassVar[bool] = False
    """Its keys are seen where the base knows them, and no farther away: it wants to know who sees what from where."""
    keeps_tokens: ClassVar[bool] = False
    """It keeps tokens as they are: `AHNConfig.slots`, `slot_heads`, `passage` and `score_layer` are for it alone."""
    forgets: ClassVar[bool] = False
    """What leaves the window has no further effect."""
    heads_apart: ClassVar[bool] = False
    """A process may hold some heads of it (tensor parallelism): they come first in each parameter that has heads, and
    no head needs to know of another but by `share`."""

    share: Share = WHOLE
    """Which heads these are of the whole memory's."""

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        *,
        q_proj: bool = False,
        slots: int = DEFAULT_SLOTS,
        bits: tuple[int, int] = (EXACT, EXACT),
        slot_heads: tuple[int, ...] | None = None,
        passage: int = 1,
        scores: Literal["own", "made", "given"] = "own",
    ) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.head_dim, self.kv_heads = hidden_size, heads, head_dim, kv_heads or heads
        self.slots, self.bits, self.passage, self.scores = slots, bits, passage, scores
        self.slot_heads = range(self.kv_heads) if slot_heads is None else slot_heads
        self.key_basis: KeyBasis | None = None
        """In which quantized tokens' keys are coded, with `AHNConfig.calibrated_keys`."""

    @property
    def write_heads(self) -> int:
        """Hw: H, or Hkv where the query heads of a key head share its states."""
        return self.heads

    def init_state(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """The state before the first write."""
        return {}

    def write_gates(self, x: Tensor) -> dict[str, Tensor]:
        """Gates of tokens with attention input x (B, n, D): float32 (B, Hw, n, ...), keyed as `closed_gates`."""
        return {}

    def slot_count(self, window: int) -> int:
        """Number of keys per layer that attention sees besides sinks and `window`, to which quantized tokens belong."""
        return 0

    def slot_bytes(self, window: int, width: int) -> int:
        """Bytes of all slots of a layer, where numbers of the model take `width` bytes; `window` as above."""
        return self.kv_heads * self.slot_count(window) * 2 * self.head_dim * torch.float32.itemsize

    def empty_slots(self, key: Tensor, window: int) -> dict[str, Tensor]:
        """The state of its slots before the first write, for keys like `key` (B, Hkv, m, P) and `window` as above."""
        return {}

    def extra_keys(
        self, left: Evicted, view: Visibility, state: dict[str, Tensor], anchored: Anchored | None = None
    ) -> MemoryKeys | None:
        """What exact attention sees besides sinks and window; None where there is nothing.

        Args:
            left: the m tokens that leave, those of padding with closed gates.
            view: of this forward; `view.writable` says which of them are real.
            state: before the first write.
            anchored: where the queries see keys that are far away, for a memory that moves keys; None where keys stay
                as they are.
        """
        return None


class RecurrentMemory(Memory, ABC):
    """A memory with recurrent states, R per head that writes. Its read is added to what exact attention gives."""

    states: ClassVar[int] = 1
    """R, a power of two. Where there are several, `routes` says how keys and queries choose, and nothing decays."""

    g_proj: nn.Linear
    """Output gate, one number per head, from the reading token's x."""

    def __init__(self, *sizes: Any, q_proj: bool = False, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.q_proj = HeadLinear(self.heads, self.head_dim) if q_proj else None
        self.build()
        self.o_proj = HeadLinear(self.heads, self.head_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values for training. `o_proj` is zero, so a new student is exactly sinks + window."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.o_proj.weight)
        if self.q_proj is not None:
            nn.init.normal_(self.q_proj.weight, std=INIT_STD)
        self.reset_gates()

    @torch.no_grad()
    def start_with_horizons(self, horizons: Tensor) -> None:
        """Before training: let each head forget with this e-fold, (H,) tokens. Nothing where nothing is forgotten."""

    def init_state(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """One float32 zero matrix per state: (B, Hw · R, P_key, P_value)."""
        shape = batch, self.write_heads * self.states, self.head_dim, self.head_dim
        return {"state": torch.zeros(shape, device=device)}

    def read_gate(self, x: Tensor) -> Tensor:
        """The output gate before its activation, of reading tokens with attention input x (B, m, D): (B, H, m).

        In the projection's own precision; whoever goes on with it goes on in float32.
        """
        return head_gate(self.g_proj, x)

    def step_gates(self, x: Tensor) -> dict[str, Gate]:
        """What `write_gates` gives, in parts where this class knows them, which a captured step finishes itself.

        Whoever overrides one of the two in a class that has both must override the other.
        """
        return {name: Gate(gate) for name, gate in self.write_gates(x).items()}

    def step_rule(self) -> StepRule | None:
        """What our kernels have to know, or None: then all goes through `scan` and `read_out`, steps uncaptured.

        A memory with a rule says by `step_norm` which norm its read goes through.
        """
        return None

    @property
    def routes(self) -> Routes | None:
        """How keys and queries choose among the states of a head, and Hw = Hkv; None where there is one, and Hw = H."""
        return None

    @property
    def step_norm(self) -> Tensor:
        """Weight of the norm of a read, (P,) or (H · P,)."""
        raise NotImplementedError

    @abstractmethod
    def build(self) -> None:
        """Create the parameters, named as in published checkpoints (all but `o_proj` and `q_proj`)."""

    @abstractmethod
    def reset_gates(self) -> None:
        """Initial values of the parameters that are not plain projections."""

    @abstractmethod
    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write m tokens in order; query i reads after token i was written.

        Args:
            q: (B, H, m, P), after RoPE.
            k: (B, Hw, m, P), after RoPE, repeated where Hw = H.
            v: (B, Hw, m, P), repeated in the same way.
            gates: of the written tokens, from `write_gates`.
            state: before the first write.

        Returns:
            The raw read (B, H, m, P) in float32 and the state after the last write.
        """

    @abstractmethod
    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalise, gate and project the raw read o (B, H, m, P) of tokens with attention input x (B, m, D).

        Returns (B, H, m, P), to be added to the exact attention's output before the base model's own `o_proj`.
        """


def head_gate(projection: nn.Linear, x: Tensor) -> Tensor:
    """One number per head and token: x (B, N, D) to (B, H, N), computed in the projection's own precision."""
    weight = projection.weight
    # Without gradients both have one type, and under autocast a product is in half precision anyway.
    mixed = torch.is_grad_enabled() and x.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if mixed and not torch.is_autocast_enabled(x.device.type):
        gate = _FewColumns.apply(x.flatten(0, 1), weight).unflatten(0, x.shape[:2])
        gate = gate if projection.bias is None else gate + projection.bias
    else:
        gate = projection(x.to(weight.dtype))
    return gate.transpose(1, 2)


class _FewColumns(torch.autograd.Function):
    """`x @ weight.T` for bfloat16 x (M, D) and float32 weight (H, D) with small H, without a float32 copy of x.

    A float32 number is the sum of two bfloat16 ones to 2^-17 of its size. Both are multiplied with x in one product
    that adds up in float32. In training, where x is as large as a layer's activations and would be kept in float32
    for every gate, this is a quarter of the traffic. The gradient of x is rounded to bfloat16 anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _sum_of_halves(_product(x, _halves(weight).t()), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight = ctx.needs_input_grad
        grad_x = grad.to(x.dtype) @ weight.to(x.dtype) if wanted_x else None
        grad_weight = _sum_of_halves(_product(_halves(grad.t()), x), dim=0) if wanted_weight else None
        return grad_x, grad_weight


def _halves(x: Tensor) -> Tensor:
    """Float32 (n, m) as (2n, m) in bfloat16: rounded, and what rounding left."""
    rounded = x.bfloat16()
    return torch.cat([rounded, (x - rounded).bfloat16()])


def _sum_of_halves(x: Tensor, dim: int) -> Tensor:
    first, second = x.chunk(2, dim)
    return first + second


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bfloat16 matrices, added up and returned in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dimension in float32, as a float32 tensor."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σx² + eps) over the last dimension, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
