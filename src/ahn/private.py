"""Private parts of other libraries that this package cannot do without, each with its reason.

Nothing promises that they stay, so no other module names one (a test looks for it), pyproject.toml bounds the versions
from above, and `make test-versions` tries the oldest and the newest: torch 2.11 to 2.13, transformers 5.17 to 5.24
(training from 5.23), accelerate 1.15, datasets 5. Whoever raises a bound reads this file beside the new source.

Nothing of theirs is replaced for a whole process. Beside what is here, `ahn.auto` uses what they offer: a registered
model type, torch's hook on the registration of modules, and one name that is added (not replaced) in `transformers`,
where trainers look up the class that a `config.json` names.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahn.errors import AHNError, install_command

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

Call = Callable[..., Any]
AnyTrainer = TypeVar("AnyTrainer", bound=type)

# -- torch: many copies at once ------------------------------------------------------------------------------------
# A captured step copies small tensors of all layers; each copy alone would be a kernel of its own.


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its target."""
    torch._foreach_copy_(targets, sources)


# -- torch: attention that also says its log-sum-exp ---------------------------------------------------------------
# F.scaled_dot_product_attention returns the output alone; to merge parts of a softmax the sum is needed as well. The
# operators below it return both. Each: query, key, value (B, H, n, P); the output and float32 sums (B, H, n).


def attention_of_cpu(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """torch's kernel for a CPU; it alone takes a mask (B or 1, H or 1, n, T), which is added to the scores."""
    out, score = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
    )
    return out, score


def attention_of_cudnn(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """cuDNN's kernel; it wants more than one query."""
    out, score, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scaling
    )
    return out, score.reshape(score.shape[:3])


def flash_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 as torch ships it."""
    out, score, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return out, score


# -- torch: modules that run compiled for a while ------------------------------------------------------------------
# `nn.Module.compile` has no counterpart that takes the compilation off again.


def compiled_call(module: nn.Module) -> Call | None:
    """What a module runs instead of its own call since somebody compiled it."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Call | None) -> None:
    """Let a module run another call, or (None) its own again."""
    module._compiled_call_impl = call


def uncompiled_call(module: nn.Module) -> Call:
    """A module's call with its hooks, compiled by nobody."""
    return module._call_impl


def children(module: nn.Module) -> dict[str, nn.Module]:
    """A module's own modules by name, one that has two names under both; `named_children` gives one of them."""
    return {name: child for name, child in module._modules.items() if child is not None}


def set_children(module: nn.Module, children: dict[str, nn.Module]) -> None:
    """Give a shallow copy of a module other modules than the original's, which `setattr` would change as well."""
    module.__dict__["_modules"] = dict.fromkeys(module._modules) | children


def set_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Give a shallow copy of a module parameters of its own, None where it has no more."""
    module.__dict__["_parameters"] = dict.fromkeys(module._parameters) | parameters


def set_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Give a shallow copy of a module buffers of its own, under the names that the original's have."""
    module.__dict__["_buffers"] = dict.fromkeys(module._buffers) | buffers


REPLICATE = "_replicate_for_data_parallel"
"""What torch.nn.DataParallel calls for a copy of a module on another GPU."""
OUTPUT_HOOKS = "transformers.utils.output_capturing"
"""The module whose hooks collect what a forward is asked for besides its logits."""


def as_written(module: nn.Module) -> bool:
    """Whether a module's call is that of its class: nobody put a forward or a hook around gradients on it."""
    return "forward" not in vars(module) and not module._backward_hooks


def copy_own(module: nn.Module, copy: nn.Module) -> None:
    """Make `copy` a shallow copy of a module without what others put on it: a forward, hooks around gradients."""
    vars(copy).update({name: x for name, x in vars(module).items() if name not in ("forward", "_is_hooked")})
    copy.__dict__["_backward_hooks"] = OrderedDict()
    set_compiled_call(copy, None)


def pre_hooks(module: nn.Module) -> list[Call]:
    """What is called before a module's forward; there is no public way to ask."""
    return list(module._forward_pre_hooks.values())


def place_hooks(module: nn.Module, change: Call) -> None:
    """Give a shallow copy of a module hooks of its own, each changed, with its place among them for a handle.

    Handles are numbers that no two hooks share, and guards of torch.compile read them: modules with the same hooks
    would not be the same to it.
    """
    if module._forward_pre_hooks:
        hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
        module._forward_pre_hooks = OrderedDict(enumerate(map(change, hooks.values())))
        kept = [place for place, handle in enumerate(hooks) if handle in with_kwargs]
        module._forward_pre_hooks_with_kwargs = OrderedDict.fromkeys(kept, True)


def drop_output_hooks(module: nn.Module) -> None:
    """Take the hooks off a shallow copy of a module that transformers leaves on a model once `output_hidden_states` or
    `output_attentions` was asked for. They do nothing until it is again, but torch.compile cannot trace how they ask.
    """
    hooks = module._forward_hooks.items()
    kept = {place: hook for place, hook in hooks if getattr(hook, "__module__", None) != OUTPUT_HOOKS}
    module._forward_hooks = OrderedDict(kept)


def inductor(module: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Call:
    """torch.compile's own backend, for a graph that was changed before: there is no public way to call it with one."""
    import torch._inductor

    return torch._inductor.compile(module, list(inputs), options=options)


def compiled_variants(limit: int) -> contextlib.AbstractContextManager[None]:
    """Inside the block one function may be compiled so often; `torch.compile` has no argument for it."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=limit)


def mark_any_size(x: Tensor, dimension: int) -> None:
    """Let torch.compile leave this size open without an error where it finds it fixed (`mark_dynamic` raises one)."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(x, dimension)


def summed(x: Tensor, group_name: str) -> Tensor:
    """The sum over processes as a new tensor. The public call writes into its argument: in compiled code that is a copy
    more, and the group, unlike its name, is nothing that two processes could have compiled alike.
    """
    total: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(total)


LINEAR, SILU = (F.linear, torch._C._nn.linear), (F.silu, torch._C._nn.silu)
"""What graphs of torch.compile call these functions: by their public name or that of what is behind it."""


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers that its state dict has; some quantized modules keep their weights there."""
    for name, x in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, x


def times_written(x: Tensor) -> int:
    """How often a tensor was written in place, for whoever keeps what was worked out of it; 0 for inference tensors."""
    return 0 if x.is_inference() else x._version


def argument_names(operator: Any) -> list[str]:
    """Names of the arguments of an operator that torch.library registered, in order."""
    return [part.name for part in operator.default._schema.arguments]


# -- transformers --------------------------------------------------------------------------------------------------

CACHE_NAMES = ("past_key_values", "cache")
CACHE = "past_key_values" if [*map(int, version("transformers").split(".")[:2])] < [5, 24] else "cache"
"""What the forward of a model and of its attention, `generate` and outputs call the cache: `cache` from 5.24 on."""


def name_cache(kwargs: dict[str, Any]) -> None:
    """Let the cache among a call's arguments have this version's name, whichever of both it was given under.

    Before 5.24 transformers takes a `cache` without a word and reads on without it.

    Raises:
        AHNError: it was given under both names.
    """
    for other in CACHE_NAMES:
        if other != CACHE and (given := kwargs.pop(other, None)) is not None:
            if kwargs.get(CACHE) is not None:
                raise AHNError("`past_key_values` and `cache` are two names of one argument; pass one of them.")
            kwargs[CACHE] = given


def attention_kernel(config: PreTrainedConfig) -> str:
    """What computes a model's attention; there is no public getter."""
    return config._attn_implementation


def set_attention_kernel(config: PreTrainedConfig, kernel: str) -> None:
    """The setter that `set_attn_implementation` ends in, without its reading of source files.

    Training sets it twice per step.
    """
    config._attn_implementation = kernel


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether transformers refuses to guess tokens ahead with a model, whose layers keep recurrent states.

    It says so once a prompt is prepared, and not by what to do instead; convolutions alone can be taken back.
    """
    return bool(model._is_stateful)


def saved_names(model: PreTrainedModel, tensors: dict[str, nn.Parameter]) -> set[str]:
    """What `save_pretrained` calls these tensors: it gives some models the names of their makers' code (EXAONE)."""
    from transformers.core_model_loading import revert_weight_conversion

    return set(revert_weight_conversion(model, dict(tensors)))


def use_one_gpu(arguments: TrainingArguments) -> None:
    """On several GPUs without a launcher the Trainer would copy the model to each, in threads; no argument says no."""
    arguments._n_gpu = 1


def sampling_loop(stop_check: type) -> Call:
    """`generate`'s loop over tokens, greedy or sampling, that asks `stop_check` when to stop: for `custom_generate`.

    Since 5.17 transformers asks a step late (`DeferredStopCheck`) so that the device need not wait, but on MPS alone,
    and by a name that the loop looks up for itself. This is that loop with another class under the name.
    """
    from transformers.generation import utils

    loop = utils.GenerationMixin._sample
    names = vars(utils) | {"DeferredStopCheck": stop_check}
    own = FunctionType(loop.__code__, names, loop.__name__, loop.__defaults__, loop.__closure__)
    own.__kwdefaults__ = loop.__kwdefaults__
    return own


TRAINER = {
    "_prepare_inputs": "batches stay on the CPU, where counting positions waits for no device",
    "_get_train_sampler": "the order of samples is the Trainer's, the loader ours",
    "_get_grad_norm": "a norm that is not finite stops the run before the memory changes",
    "_save_checkpoint": "checkpoints are the memory alone, safetensors without pickles, and appear whole or not at all",
    "_load_from_checkpoint": "the memory's weights were read before the model was wrapped",
    "_load_optimizer_and_scheduler": "from our files",
    "_load_rng_state": "from our files",
}
"""Methods of transformers' Trainer that ours overrides or calls, and why no callback or argument does."""


def overrides_trainer(cls: AnyTrainer) -> AnyTrainer:
    """A subclass of Trainer, if this version has every method that it overrides: else they would never be called.

    Raises:
        AHNError: one is missing.
    """
    missing = [name for name in TRAINER if not any(name in vars(base) for base in cls.__mro__[1:])]
    if missing:
        raise AHNError(
            f"This transformers has no Trainer.{missing[0]}, which training relies on; "
            f"{install_command('train')} brings one that has."
        )
    return cls


# -- accelerate and datasets ---------------------------------------------------------------------------------------

HOOKED_FORWARD = "_old_forward"
"""Where accelerate keeps the forward that its hook wraps: what is put there runs inside the hook."""


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with a weight computes: accelerate may keep the weight elsewhere, and put a stand-in here."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    devices = [device for one in hooks if (device := getattr(one, "execution_device", None)) is not None]
    weight = next(module.parameters(), None)
    if weight is None:
        return torch.device("cpu")  # torch's own quantized modules pack theirs, and compute nowhere else
    return torch.device(devices[0]) if devices and weight.is_meta else weight.device


def bring_back(module: nn.Module, device: torch.device) -> None:
    """Take a module out of what accelerate has offloaded, with all its weights on a device from now on."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module, recurse=True)
    module.to(device)


def has_own_forward(model: PreTrainedModel) -> bool:
    """Whether what a model runs is its class's forward, perhaps inside accelerate's hook, and nobody's besides."""
    return "forward" not in vars(model) or HOOKED_FORWARD in vars(model)


def set_forward(model: nn.Module, forward: Call) -> None:
    """Put a forward before the model's own, inside accelerate's hook if the model has one."""
    setattr(model, HOOKED_FORWARD if HOOKED_FORWARD in vars(model) else "forward", forward)
    hook = vars(model).get("_hf_hook")
    skipped = getattr(hook, "skip_keys", None) or ()
    skipped = {skipped} if isinstance(skipped, str) else set(skipped)
    if hook is not None and CACHE in skipped:  # under its other name a cache would be moved to the first device
        hook.skip_keys = skipped | set(CACHE_NAMES)


def reset_forward(model: nn.Module, kind: type) -> None:
    """Take a forward of this kind off again."""
    if isinstance(vars(model).get("forward"), kind):
        delattr(model, "forward")
    if isinstance(vars(model).get(HOOKED_FORWARD), kind):
        setattr(model, HOOKED_FORWARD, MethodType(type(model).forward, model))


def fingerprint(rows: Dataset) -> str:
    """What datasets knows a table's content by: one with the same transforms is found in its cache again."""
    return rows._fingerprint
