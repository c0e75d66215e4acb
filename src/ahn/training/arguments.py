"""From a YAML file and flags to checked arguments: a flag wins over the file, an unknown name is refused.

Flags are parsed by transformers' `HfArgumentParser` from two dataclasses: `Settings` and the Trainer's own arguments.
Flags of the published training script that have no meaning of their own here are accepted if they say what is done
anyway (`COMPATIBLE`), renamed ones are translated (`RENAMED`).
"""

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
import yaml
from transformers import HfArgumentParser, SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from ahn.errors import AHNError, first_line, install_command
from ahn.files import read_text
from ahn.private import use_one_gpu
from ahn.training.settings import Settings
from ahn.training.sharding import TRUE, recomputes, shard

RENAMED = {
    "warmup_ratio": "warmup_steps",  # a number below 1 is a share there
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "flash_attn": "attn_implementation",
}
KERNELS = {"fa2": "flash_attention_2", "disabled": "eager", "sdpa": "sdpa", "auto": None}
COMPATIBLE: dict[str, tuple[str, ...] | None] = {
    "stage": ("sft",),
    "finetuning_type": ("freeze",),
    "freeze_extra_modules": ("ahn",),
    "layer_implementation": None,
    "template": None,
    "use_fast_tokenizer": TRUE,
    "do_train": TRUE,
}
"""Published flags that only say what always happens here, with the values that do (None: any)."""
REFUSED = {
    "auto_find_batch_size": "choose per_device_train_batch_size",
    "bf16_full_eval": "the base is bfloat16 with --bf16 already",
    "fp16": "use bf16",
    "fp16_full_eval": "use bf16",
    "label_smoothing_factor": "the teacher's distribution is the target",
    "load_best_model_at_end": "load the checkpoint that you prefer: each one is an adapter",
    "neftune_noise_alpha": "student and teacher must read the same input",
    "push_to_hub": "upload the finished folder with `hf upload`",
    "save_only_model": "checkpoints are small and always complete",
    "torch_compile": "the memory's hooks cannot be compiled",
    "use_liger_kernel": "the losses are chunked already",
}
"""Trainer arguments that this training cannot honour, and what to do instead."""


@dataclasses.dataclass
class TrainerArguments(TrainingArguments):
    """The Trainer's arguments with the paper's recipe as defaults."""

    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-4
    lr_scheduler_type: SchedulerType = SchedulerType.COSINE
    warmup_steps: float = 0.1
    weight_decay: float = 0.1
    logging_steps: float = 10
    save_total_limit: int | None = 3
    fsdp: bool = False
    activation_checkpointing_kwargs: dict[str, Any] | str | None = dataclasses.field(
        default_factory=lambda: {"use_reentrant": False}
    )


class Arguments(NamedTuple):
    """Everything about one run."""

    settings: Settings
    trainer: TrainerArguments


class Parser(HfArgumentParser):
    """Says what is wrong in one sentence instead of printing all flags and leaving."""

    def __init__(self) -> None:
        if "activation_checkpointing" not in {field.name for field in dataclasses.fields(TrainingArguments)}:
            raise AHNError(
                f"Training needs transformers 5.23 or later, this is {transformers.__version__}: "
                f"{install_command('train')}."
            )
        super().__init__([Settings, TrainerArguments], allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise AHNError(message[0].upper() + message[1:].rstrip(".") + ".")

    @property
    def names(self) -> set[str]:
        """Every name that is understood, with underscores."""
        options = {option.removeprefix("--").replace("-", "_") for option in self._option_string_actions}
        return options | set(RENAMED) | set(COMPATIBLE)


def parse(arguments: Sequence[str]) -> Arguments:
    """Arguments of a run from a command line: an optional YAML file first, then flags.

    Raises:
        AHNError: an unknown name, a wrong value, a missing setting or a contradiction; nothing was loaded yet.
    """
    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser = Parser()
    given = _from_flags(arguments[1:] if file else arguments)
    values = ({} if file is None else read_yaml(_configuration(Path(file)))) | given
    _check_names(values, parser.names)
    _drop_compatible(values)
    _translate(values)
    notes = shard(values)
    words = [word for name, value in values.items() if value is not None for word in _as_flag(name, value)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            settings, trainer, unused = parser.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
    except AHNError:
        raise
    except (ValueError, OSError, ImportError, TypeError) as error:  # what the Trainer's arguments refuse
        raise AHNError(f"{' '.join(str(error).split()).rstrip('.')}.") from error
    if unused:
        name = next(name for name, value in values.items() if isinstance(value, list) and unused[0] in map(str, value))
        late = unused[-1].endswith((".yaml", ".yml"))
        hint = "; the configuration file comes first, before all flags" if late else ""
        raise AHNError(f"{name} takes one value, got {' '.join(map(str, values[name]))}{hint}.")
    settings.notes += notes
    asked = values.get("memory_horizons") is not None and settings.horizons is not None
    if asked and not settings.decays:
        settings.notes.append(f"memory_horizons changes nothing for {settings.ahn_implementation}, which never forgets")
    _check_trainer(settings, trainer)
    return Arguments(settings, trainer)


def _configuration(path: Path) -> Path:
    """A file as it is, else the one of that name that ships (`configs/debug.yaml`), from any folder."""
    package = Path(__file__).parents[1]
    if not path.exists() and path.parent == Path("configs"):
        for folder in (package, package.parents[1]):  # as it is installed, as it lies in a checkout
            if (folder / path).is_file():
                return folder / path
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file by name, with underscores."""
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
        written = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise AHNError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or any(not isinstance(name, str) for name in content):
        raise AHNError(f"{path} must hold names and values, such as 'dataset: chatqa2', one per line.")
    places: dict[str, int] = {}
    for key, _ in written.value:  # of two lines YAML's reader takes the last one without a word
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if places.setdefault(name, line) != line:
            raise AHNError(f"{path} has {name} twice, in lines {places[name]} and {line}: leave one of them out.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _from_flags(words: Sequence[str]) -> dict[str, Any]:
    """Values by name: `--name value`, `--name=value`, several values, or a lone `--name` for true."""
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name is None:
            raise AHNError(
                f"Unexpected {word!r}: give one configuration file first, then flags like --dataset chatqa2."
            )
        else:
            found[name].append(word)
    # An empty word at the end of a script's line, or a stray line break, is no value.
    stripped = {name: [v for v in values if v.strip()] for name, values in found.items()}
    return {name: (v[0] if len(v) == 1 else v) if v else "true" for name, v in stripped.items()}


def _check_names(values: dict[str, Any], known: set[str]) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "`ahn train --help` lists what there is."
            raise AHNError(f"Unknown setting {name!r}; {hint}")


def _drop_compatible(values: dict[str, Any]) -> None:
    for name, allowed in COMPATIBLE.items():
        value = str(values.pop(name, "")).lower()
        if value and allowed is not None and value not in allowed:
            raise AHNError(
                f"{name} {value} is not what this training does; leave it out or use {allowed[0]} (all but the memory "
                "is frozen, and learns from the base model's own full attention)."
            )


def _translate(values: dict[str, Any]) -> None:
    """Names of today for those of older scripts."""
    for old, new in RENAMED.items():
        if old not in values:
            continue
        if new in values:
            raise AHNError(f"{old} and {new} are the same setting; leave one of them out.")
        value = values.pop(old)
        if old == "warmup_ratio" and not 0 <= _number(old, value) < 1:
            raise AHNError(f"warmup_ratio must be at least 0 and below 1, got {value}.")
        values[new] = KERNELS.get(str(value), value) if old == "flash_attn" else value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise AHNError(f"{name} must be a number, got {value!r}.") from None


def _as_flag(name: str, value: Any) -> list[str]:
    if value is False and name.endswith("_strategy"):
        return [f"--{name}", "no"]  # YAML reads a bare no as false
    if isinstance(value, bool):
        return [f"--{name}", str(value).lower()]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


AT_LEAST = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "seed"), 0),
    **dict.fromkeys(("dataloader_num_workers", "data_seed", "eval_delay", "ddp_timeout"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    "save_total_limit": 1,
}
"""The smallest value of the Trainer's numbers; it takes smaller ones, and dies of them later or does nothing."""
SEEDS = ("seed", "data_seed")
"""Below 2 ** 32, as NumPy wants them."""
ABOVE_ZERO = ("logging_steps", "save_steps", "eval_steps", "num_train_epochs")


def _check_numbers(trainer: TrainerArguments) -> None:
    for name, least in AT_LEAST.items():
        value = getattr(trainer, name, None)
        if value is not None and not least <= value < math.inf:  # nor is a NaN
            raise AHNError(f"{name} must be a number of at least {least}, got {value}.")
    for name in SEEDS:
        if (getattr(trainer, name) or 0) >= 1 << 32:
            raise AHNError(f"{name} must be below 4294967296, got {getattr(trainer, name)}.")
    for name in ABOVE_ZERO:
        value = getattr(trainer, name)
        if value is not None and not 0 < value < math.inf:
            raise AHNError(f"{name} must be above 0, got {value}.")
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        raise AHNError(
            f"max_steps must be at least 1 (or -1: as many as num_train_epochs make), got {trainer.max_steps}."
        )


def _check_optimizer(trainer: TrainerArguments) -> None:
    """Make the optimizer and the schedule for one number, so that what they refuse is refused before the work."""
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(trainer)
        optimizer = made([torch.nn.Parameter(torch.zeros(1))], **options)
        steps = max(2, trainer.max_steps)
        kwargs = trainer.lr_scheduler_kwargs or {}
        if trainer.lr_scheduler_type not in NEED_MORE:
            get_scheduler(trainer.lr_scheduler_type, optimizer, trainer.get_warmup_steps(steps), steps, kwargs)
    except (ValueError, TypeError, ImportError, AssertionError, RuntimeError) as error:
        raise AHNError(f"The optimizer or its schedule cannot be made: {first_line(error)}.") from error


NEED_MORE = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""Schedules that follow a measured loss; the Trainer makes them its own way."""


def _check_trainer(settings: Settings, trainer: TrainerArguments) -> None:
    _check_numbers(trainer)
    _check_optimizer(trainer)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainerArguments)}
    for name, instead in REFUSED.items():
        if getattr(trainer, name) != defaults[name]:
            raise AHNError(f"{name} is not supported here: {instead}.")
    if settings.streaming and trainer.max_steps < 1:
        raise AHNError("streaming needs max_steps: the length of a stream is not known.")
    if settings.streaming and 0 < settings.val_size < 1:
        raise AHNError("With streaming val_size must be a number of rows: the length of a stream is not known.")
    held_out = bool(settings.eval_dataset or settings.val_size)
    if trainer.eval_strategy != "no" and not held_out:
        raise AHNError(f"eval_strategy {trainer.eval_strategy.value} needs held-out data: eval_dataset or val_size.")
    if held_out:
        trainer.eval_on_start = True  # the memory reads zero then: this measures sinks + window
    here = get_available_reporting_integrations()
    if absent := [name for name in trainer.report_to if name not in here]:
        raise AHNError(f"report_to {absent[0]} is not possible here: pip install {absent[0]}, or use --report_to none.")
    # The base's precision is ours to choose; the Trainer's mixed precision would cast the memory as well.
    trainer.mixed_precision = "no"
    trainer.ddp_find_unused_parameters = trainer.ddp_broadcast_buffers = False
    trainer.logging_nan_inf_filter = False  # asks the device after every batch; the trainer itself stops at a NaN
    trainer.data_seed = trainer.seed if trainer.data_seed is None else trainer.data_seed
    if trainer.n_gpu > 1:
        settings.notes.append(
            f"one of {trainer.n_gpu} GPUs is used; torchrun --nproc_per_node {trainer.n_gpu} uses all"
        )
        use_one_gpu(trainer)
    if trainer.device.type == "cpu":
        trainer.dataloader_pin_memory = False
    elif trainer.activation_checkpointing is False and not recomputes():
        settings.notes.append("activations are kept, not recomputed: --activation_checkpointing true saves memory")
