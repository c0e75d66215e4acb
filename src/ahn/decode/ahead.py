"""`generate` with captured steps: whether a text is finished is asked while the GPU is at the next step already.

transformers reads after every token whether all rows are finished, and only then prepares the next step: the GPU waits
for what the host does between two steps. Here the next step is launched first. If it turns out that the text was
finished, that step has done nothing: the GPU had the same flag, and its rows were not active (see `Runner`). What the
host counted is taken back, and so are the random numbers of one token too many.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer, GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from ahn import private
from ahn.cache.conversation import AHNCache
from ahn.decode import runner

_ONE_TEXT_A_ROW = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_LOOKED_AT = {"logits_processor": ("transformers", "ahn"), "stopping_criteria": ("transformers",)}
"""Arguments of `generate`, and the packages whose classes do not mind being asked about one token more."""


def loop(model: PreTrainedModel, kwargs: dict[str, Any], ids: Any) -> Callable[..., Any] | None:
    """What to give `generate` as its `custom_generate`; None where its own loop has to do.

    What others wrote to change or stop a text may notice that it is asked about one token more.
    """
    if not isinstance(ids, Tensor) or not runner.on_gpu(ids) or kwargs.get("custom_generate") is not None:
        return None
    for name, packages in _LOOKED_AT.items():
        if any(type(x).__module__.split(".")[0] not in packages for x in kwargs.get(name) or ()):
            return None
    config = copy.deepcopy(kwargs.get("generation_config") or model.generation_config)
    config.update(**{name: x for name, x in kwargs.items() if name != "generation_config" and hasattr(config, name)})
    known = config.get_generation_mode(kwargs.get("assistant_model")) in _ONE_TEXT_A_ROW
    in_step = kwargs.get("synced_gpus") or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()
    if not known or config.is_assistant or in_step:
        return None
    # transformers hands a loop of others no streamer.
    return functools.partial(_loop(), streamer=kwargs.get("streamer"))


@memoize
def _loop() -> Callable[..., Any]:
    return private.sampling_loop(StepsAhead)


class StepsAhead:
    """When to stop, as transformers' loop asks; tokens come to the streamer in order, each while the next is made.

    Args:
        input_ids: (B, L).
        max_length: at which the text ends whatever it says, or None.
        cache: of the conversation.
    """

    @staticmethod
    def is_supported(device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool) -> bool:
        """Whether transformers is to ask this class."""
        return isinstance(cache, AHNCache)

    def __init__(
        self,
        input_ids: Tensor,
        max_length: int | None,
        cache: AHNCache,
        cache_is_returned: bool,
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.max_length, self.cache, self.streamer = max_length, cache, streamer
        self.device = input_ids.device
        self.slots = [_Slot(input_ids) for _ in range(2)]
        self.open: _Slot | None = None
        """What was not read yet."""
        self.undone = 0
        cache.ahead = self

    def __call__(self, unfinished: Tensor, tokens: Tensor, length: int) -> bool:
        slot = self.slots[0]
        going = unfinished.max() != 0
        slot.write(going, tokens)
        if self.open is not None and self._ended():
            return True
        captured = self.cache.captured
        ends = self.max_length is not None and length >= self.max_length
        if ends or captured is None or captured.retained is not None or not captured.current(self.cache):
            return not self._read(slot) or ends
        captured.going, self.open = going, slot
        slot.seen, slot.random = self.cache.seen, _random_state(self.device)
        self.slots.reverse()
        return False

    def finish(self) -> int:
        """How many steps transformers has to take out of its outputs."""
        self.settle()
        return self.undone

    def settle(self) -> None:
        """Leave the conversation as it was when the text was finished, if it was; also after an interrupt."""
        self.cache.ahead = None
        if self.open is not None:
            self._ended()

    def _ended(self) -> bool:
        """Whether the text was finished before the latest step: then that one is taken back."""
        slot, self.open = self.open, None
        captured = self.cache.captured
        assert slot is not None
        changed = captured.going is not None and self.cache.seen > slot.seen  # it was no captured step
        captured.going = None
        if self._read(slot):
            return False
        self.undone = 1
        if not changed:
            self.cache.progress.seen = slot.seen
        _set_random_state(slot.random, self.device)
        return True

    def _read(self, slot: _Slot) -> bool:
        """Hand a token on; whether the text goes on after it."""
        if slot.written is not None:
            slot.written.synchronize()
        if self.streamer is not None:
            self.streamer.put(slot.tokens.clone())
        return bool(slot.going)


class _Slot:
    """Of one step, on the host: the tokens (B,), and whether any row goes on."""

    def __init__(self, input_ids: Tensor) -> None:
        pinned = input_ids.is_cuda
        self.going = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        self.tokens = torch.zeros(len(input_ids), dtype=torch.long, pin_memory=pinned)
        self.written = torch.cuda.Event() if pinned else None
        self.seen = 0
        self.random: Tensor | None = None

    def write(self, going: Tensor, tokens: Tensor) -> None:
        self.going.copy_(going, non_blocking=True)
        self.tokens.copy_(tokens, non_blocking=True)
        if self.written is not None:
            self.written.record()


def _random_state(device: torch.device) -> Tensor:
    """Where random numbers are on this device; nobody waits for it."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor | None, device: torch.device) -> None:
    if state is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif state is not None:
        torch.set_rng_state(state)
