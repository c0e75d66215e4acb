"""The captured step of one conversation: fixed buffers, one CUDA graph, and when it may be used."""

import dataclasses
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ahn import private
from ahn.cache import tier
from ahn.cache.conversation import AHNCache
from ahn.cache.progress import new_columns
from ahn.config import AHNConfig
from ahn.decode.compiled import layers_compiled, on_several_devices
from ahn.decode.layer import StepForward
from ahn.decode.retained import RetainedSteps
from ahn.decode.twin import possible, states_lent, twin_of
from ahn.layout.rotation import Rotation
from ahn.layout.state import LayerState, Tensors, give_scores
from ahn.memory import RecurrentMemory
from ahn.memory.retained_tokens import RetainedTokens
from ahn.ops import has_triton
from ahn.ops.basis import Basis
from ahn.ops.quantize import precise
from ahn.ops.step.reference import supported
from ahn.ops.step.turn import TierTurn, turns_halves
from ahn.wrappers import decoder_of

_capturing = threading.Lock()  # one at a time in a process: a recording begins by waiting for the whole device
MORE_OUTPUTS = ("output_hidden_states", "output_attentions")


def runs(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether this forward is a step that a graph can do; everything else takes the ordinary way."""
    if not _is_step(model, kwargs):
        return False
    ids, cache = kwargs["input_ids"], kwargs[private.CACHE]
    runner: Runner | None = cache.captured
    return (runner is not None and runner.fits(model, cache, ids)) or can_capture(model, cache, ids)


def _is_step(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether it is one, whatever its conversation holds."""
    ids, cache = kwargs.get("input_ids"), kwargs.get(private.CACHE)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or not on_gpu(ids):
        return False
    return isinstance(cache, AHNCache) and not cache.in_parts and plain(model, kwargs)


def plain(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a forward is for inference alone and is asked for nothing but logits."""
    if torch.is_grad_enabled() or model.training or not model._ahn.enabled:
        return False
    if kwargs.get("labels") is not None or kwargs.get("inputs_embeds") is not None:
        return False
    if model._ahn.observers:  # a graph asks no one
        return False
    return asked(model, kwargs, "return_dict") is not False and not any(asked(model, kwargs, x) for x in MORE_OUTPUTS)


def asked(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An argument of forward, or what the model's configuration says of it."""
    value = kwargs.get(name)
    return getattr(model.config, name, None) if value is None else value


def on_gpu(ids: Tensor) -> bool:
    """Whether there are graphs, and our kernels, where these tokens are."""
    return ids.is_cuda and has_triton()


def can_capture(model: PreTrainedModel, cache: AHNCache, ids: Tensor) -> bool:
    """Whether a step of this conversation can be recorded."""
    layers, decoder = cache.memory_layers, decoder_of(model)
    if on_several_devices(model):
        return False
    if cache.offloading or cache.seen == 0 or not len(layers) == len(cache.layers) == len(decoder.layers):
        return False
    if cache.recurrent:  # a step changes nothing but what attention keeps
        return False
    if hasattr(model.base_model, "rope_deltas"):  # positions of several dimensions, by images that came before
        return False
    head = model.get_output_embeddings()
    if head is None or any(x.device != ids.device for x in (head.weight, *(layer.keys for layer in layers.values()))):
        return False
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(x.self_attn, "sinks") for x in decoder.layers):
        return False  # scores that only the base model's own kernels know
    if "dynamic" in str(getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)):
        return False  # asks the device, at every token, whether the text has become too long for its angles
    padding = cache.progress.padding
    if (padding is not None and bool(padding.ended.any())) or not possible(model):
        return False
    memory, turning = decoder.layers[0].ahn.fn, _turning(model, cache)
    if not supported(memory.head_dim, turning is not None):
        return False
    if turning is not None and not turns_halves(turning, memory.head_dim, ids.device):
        return False
    kept = isinstance(memory, RetainedTokens) or memory.forgets
    return kept or (isinstance(memory, RecurrentMemory) and memory.step_rule() is not None)


def _turning(model: PreTrainedModel, cache: AHNCache) -> Rotation | None:
    """The base's rotation where keys of the tier, or of the memory, are turned when they are seen."""
    rotation: Rotation | None = model._ahn.rotation
    moves = decoder_of(model).layers[0].ahn.fn.moves_keys
    return rotation if moves or (cache.config.quantized and cache.config.keys_before_rope) else None


@torch.inference_mode(False)
def _turn(rotation: Rotation, keys: Tensor, config: AHNConfig) -> TierTurn:
    """For steps whose windows have keys like these."""
    like = keys.new_zeros(1, dtype=precise(keys.dtype))
    return TierTurn.of(rotation, like, len(keys), config.window, config.sinks, config.quantized, config.tier_reach)


def forward(model: PreTrainedModel, kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """One token per row by replaying the conversation's graph, which the first call captures; None where `runs` is not.

    That is not asked first: a GPU waits for whatever is done between two steps.
    """
    if not _is_step(model, kwargs):
        return None
    cache: AHNCache = kwargs[private.CACHE]
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    runner: Runner | None = cache.captured
    fits = runner is not None and runner.fits(model, cache, ids)
    if not fits and not can_capture(model, cache, ids):
        return None
    new = new_columns(mask, cache.seen, 1)
    if runner is None or not fits:
        cache.check_batch(len(ids))
        runner = cache.captured = Runner(model, cache, len(ids))
    elif not runner.current(cache):  # something else has moved the conversation on
        runner.catch_up(cache)
    cache.place_sinks(model._ahn.rotation)
    real = None if new is None else new[:, -1]
    if runner.retained is not None:
        runner.retained.begin(cache, states_of(cache), real)
    logits = runner(ids, kwargs.get("position_ids"), real)
    cache.progress.finish_step(runner.positions, masked=new is not None)
    return CausalLMOutputWithPast(logits=logits, **{private.CACHE: cache})


class StepCache(Cache):
    """What the base model's attention finds in place of a cache: a step's keys and values go straight through."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class Runner:
    """A graph over the buffers of one cache.

    Attributes:
        positions: (B,) real tokens that each row has read; the graph itself moves it on.
        retained: what is to be done between steps, with a memory that keeps tokens.
        bases: by layer, in which keys of the tier are coded.
        going: () bool on the device, or None: without it the next step changes nothing; see `ahn.decode.ahead`.
        step: what every layer is given. A graph knows addresses alone: its tensors live as long as this does.
    """

    def __init__(self, model: PreTrainedModel, cache: AHNCache, batch: int) -> None:
        # Held, so that the weights of a model that was moved and came back cannot lie in the same place.
        self.adapter, self.attention = model._ahn, decoder_of(model).layers[0].self_attn
        self.weight = self.attention.o_proj.weight.detach()
        device = model.get_output_embeddings().weight.device
        with torch.inference_mode(False):  # what is made here is written in any mode
            self.ids, self.position_ids = (torch.zeros(batch, 1, dtype=torch.long, device=device) for _ in range(2))
            self.positions, self.offset = (torch.zeros(batch, dtype=torch.long, device=device) for _ in range(2))
            self.active = torch.zeros(batch, dtype=torch.bool, device=device)
            cache.enter_slots()
            states, config, rotation = states_of(cache), cache.config, self.adapter.rotation
            if config.quantized:
                for state in states.values():
                    state.tier = state.tier or tier.empty(config.quantized, state.window, config.tier_bits)
            self.retained = _retained(model, cache, states)
            self.bases = _bases(model, states) if config.quantized and config.calibrated_keys else {}
        self.all_active = False
        self.going: Tensor | None = None
        # The cache owns its tensors: once it has others, those that the graph knows are freed.
        self.rings = [tuple(map(weakref.ref, _rings(state))) for state in states.values()]
        self.memories = [state.memory for state in states.values()]
        self.catch_up(cache)
        self.step = step = StepForward(self.positions, self.active, config.sinks, config.window + config.quantized)
        if rotation is not None and config.quantized and config.keys_before_rope:
            step.turn = _turn(rotation, next(iter(states.values())).window.keys, config)
        inputs = {"input_ids": self.ids, "position_ids": self.position_ids, private.CACHE: StepCache()}

        twin, seen = twin_of(model), {} if self.retained is None else self.retained.seen
        if rotation is not None:  # by the embedding that is compiled while a step is captured
            rotation = dataclasses.replace(rotation, angles=decoder_of(twin).rotary_emb)

        def once() -> Tensor:
            if rotation is not None and step.turn is not None:
                step.turn.update(rotation, self.positions, config.window, config.quantized)
            if rotation is not None and self.retained is not None:
                self.retained.update(rotation, self.positions)
            with states_lent(twin, states, seen, self.bases):
                logits: Tensor = type(model).forward(twin, **inputs, use_cache=True, ahn_forward=step).logits
            give_scores(states, config.score_layer)
            self.positions += self.active
            return logits

        self.replay, self.logits = capture(twin, once)

    def fits(self, model: PreTrainedModel, cache: AHNCache, ids: Tensor) -> bool:
        """Still the same weights, the same buffers in the same order, and as many rows."""
        # Asked for every token: looking for the decoder would take longer than all the rest.
        moved = self.attention.o_proj.weight.data_ptr() != self.weight.data_ptr()
        if len(ids) != len(self.ids) or model._ahn is not self.adapter or moved:
            return False
        states = states_of(cache).values()
        if not all(state.window.in_slots for state in states):
            return False
        return [[id(x) for x in _rings(state)] for state in states] == [[id(x()) for x in own] for own in self.rings]

    def current(self, cache: AHNCache) -> bool:
        """Whether the conversation's latest forward was a step of this runner."""
        return cache.progress.lengths is self.positions

    def catch_up(self, cache: AHNCache) -> None:
        """Take over how far each row has read, and the memories: an ordinary step puts new ones in their place."""
        self.positions.copy_(cache.enter_slots())
        self.offset.copy_(cache.columns_before())
        cache.progress.lengths = self.positions
        take_over(cache, self.memories)
        if self.retained is not None:
            self.retained.renew()

    def __call__(self, ids: Tensor, position_ids: Tensor | None, real: Tensor | None) -> Tensor:
        """Logits (B, 1, V) of one token per row; rows that are not `real` (B,) change nothing."""
        self.ids.copy_(ids)
        self.position_ids.copy_((self.positions + self.offset)[:, None] if position_ids is None else position_ids)
        going, self.going = self.going, None
        if going is not None:
            self.active.copy_(going if real is None else going & real)
            self.all_active = False
        elif real is not None:
            self.active.copy_(real)
            self.all_active = False
        elif not self.all_active:
            self.active.fill_(True)
            self.all_active = True
        self.replay()
        return self.logits.clone()


def _retained(model: PreTrainedModel, cache: AHNCache, states: dict[int, LayerState]) -> RetainedSteps | None:
    """What steps with a memory that keeps tokens need besides."""
    layers = decoder_of(model).layers
    if not isinstance(layers[0].ahn.fn, RetainedTokens):
        return None
    return RetainedSteps(layers, cache, model._ahn.rotation, states)


def _bases(model: PreTrainedModel, states: dict[int, LayerState]) -> dict[int, Basis]:
    """Of all layers, in which their keys are coded."""
    layers = decoder_of(model).layers
    return {index: layers[index].ahn.fn.key_basis.basis(state.window.keys.dtype) for index, state in states.items()}


def states_of(cache: AHNCache) -> dict[int, LayerState]:
    """Of all layers, each of which has read something."""
    return {index: layer.state for index, layer in cache.memory_layers.items() if layer.state is not None}


def take_over(cache: AHNCache, memories: list[Tensors]) -> None:
    """Put what a cache's memories hold into the tensors that a graph knows, which take their place."""
    for state, own in zip(states_of(cache).values(), memories, strict=True):
        for name, x in own.items():
            if state.memory[name] is not x:
                x.copy_(state.memory[name])
        state.memory = own


def _rings(state: LayerState) -> list[Tensor]:
    """One tensor of each ring, which stands for all: they come and go together."""
    return [state.window.keys] if state.tier is None else [state.window.keys, state.tier.keys.codes]


def _a_weight(model: PreTrainedModel) -> Tensor:
    """A small weight that is where all are."""
    weight: Tensor = decoder_of(model).layers[0].self_attn.o_proj.weight
    return weight.to_local() if isinstance(weight, DTensor) else weight


def capture(twin: PreTrainedModel, once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Compile and record a step: how to repeat it, and where its logits will be.

    Every row is inactive until the first replay, so compiling leaves the conversation as it is. Other threads go on
    meanwhile, with the same model or another; those that capture as well wait.
    """
    # Graphs and kernels belong to the current device, which need not be the model's.
    device = _a_weight(twin).device
    with _capturing, layers_compiled(twin), torch.cuda.device(device):
        side = _capture_stream(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device is no part of this graph, and no reason to give it up.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            logits = once()
    return graph.replay, logits


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which all steps of a device are captured.

    cuBLAS keeps 64 MiB for each stream that it has worked on, for ever. torch hands out 32 streams in turn, so a stream
    for each capture had taken 2 GiB after 32 of them.
    """
    return torch.cuda.Stream(device)
