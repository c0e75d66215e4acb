"""From what a user names to a model that reads. In this order, each once: open, settings, check, load, attach.

Code that lies in a model's directory is never run (`trust_remote_code`), whatever its configuration asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ahn.checkpoint.adapter import attach_checked, checked_settings
from ahn.checkpoint.directory import CONFIG, Checkpoint, is_ahn
from ahn.checkpoint.format import changed, check_kernels, transformers_config
from ahn.checkpoint.hub import local_directory
from ahn.config import DTYPES, AHNConfig, Reach, overridden
from ahn.errors import AHNError, first_line
from ahn.files import read_json
from ahn.model import attention
from ahn.model.adapter import attach
from ahn.model.saving import BASE_NAME, base_config
from ahn.shape import trained_length
from ahn.wrappers import decoder_of

PathLike = str | os.PathLike[str]
_LOADING = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
)
"""What loading raises; the last is torch's, about a device that it was built without."""
GENERATION, PEFT_CONFIG = "generation_config.json", "adapter_config.json"
HUB = ("cache_dir", "force_download", "local_files_only", "token")


def from_pretrained(
    directory: PathLike,
    base: PathLike | None = None,
    window: int | None = None,
    sinks: int | None = None,
    quantized: int | None = None,
    max_distance: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model with its AHN.

    Args:
        directory: an adapter or a merged checkpoint, ours or published: a directory or a Hub id.
        base: for an adapter, the base model's directory or Hub id. Default: what the adapter's configuration names.
        window: window to use. Default: the saved one; for published checkpoints 32640, never their `sliding_window`.
        sinks: likewise; for published checkpoints 128.
        quantized: likewise; for published checkpoints 0.
        max_distance: likewise; for published checkpoints 0, the published placing of sinks.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `dtype` or `device_map`; `revision` is that of
            `directory`.

    Returns:
        The model in evaluation mode.

    Raises:
        AHNError: the base is not named or not found, does not fit, or a file is missing or damaged.
    """
    reach: Reach = {"window": window, "sinks": sinks, "quantized": quantized, "max_distance": max_distance}
    return load(directory, base, reach, **kwargs)


def load(
    directory: PathLike, base: PathLike | None = None, reach: Reach | None = None, auto: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """`from_pretrained`, with the Auto class of transformers that finds the base's class; None: as it was saved."""
    for name in ("subfolder", "variant", "gguf_file"):
        if kwargs.pop(name, None):
            raise AHNError(
                f"{name}= is not supported for a checkpoint with an AHN: give the directory that holds its config.json "
                "and model.safetensors."
            )
    if kwargs.get("attn_implementation") == attention.NAME:  # from the configuration of an adapted model
        del kwargs["attn_implementation"]
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    revision = {"revision": kwargs.pop("revision")} if "revision" in kwargs else {}
    checkpoint = Checkpoint.open(local_directory(directory, **hub, **revision))
    if checkpoint.kind == "base":
        raise AHNError(
            f"{checkpoint.path} has no AHN tensors: load it with transformers, then ahn.attach or ahn.load_adapter."
        )
    config = kwargs.pop("config", None)
    return ModelSource.of(checkpoint, directory, base, hub, config, **(reach or {})).load(auto=auto, **kwargs)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's files, opened and checked; no weights are loaded.

    Attributes:
        name: what the loaded model's `name_or_path` will be.
        base: where the base weights are: a plain model or a merged checkpoint.
        ahn: where the AHN is: an adapter, the merged checkpoint, or None.
        settings: the AHN's, with what was given in place of the saved ones. A plain model has some if quantized tokens
            were asked for, which need no weights.
        given: whether window and sinks were both given.
        config: the base's, if not the one in its folder.
    """

    name: PathLike
    base: Checkpoint
    ahn: Checkpoint | None = None
    settings: AHNConfig | None = None
    given: bool = False
    config: PreTrainedConfig | None = None

    @classmethod
    def open(cls, model: str, adapter: str | None = None, **reach: Unpack[Reach]) -> Self:
        """What a command line names: a base model, alone or with an adapter, a merged checkpoint or an adapter."""
        named, base = (adapter, model) if adapter else (model, None)
        checkpoint = Checkpoint.open(local_directory(named))
        if checkpoint.kind == "base" and adapter is None:
            return cls(model, checkpoint, settings=_tier_alone(checkpoint, **reach))
        return cls.of(checkpoint, named, base, **reach)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        name: PathLike,
        base: PathLike | None,
        hub: dict[str, Any] | None = None,
        config: PreTrainedConfig | None = None,
        **reach: Unpack[Reach],
    ) -> Self:
        """A checkpoint with an AHN, called `name`, and its base; other arguments as `from_pretrained`."""
        files = checkpoint
        if checkpoint.kind != "merged":
            named = base or _named_base(checkpoint.require("adapter"))
            if not named:
                raise AHNError(
                    f"{checkpoint.path} does not say which base model it belongs to: pass base=, a directory or Hub id."
                )
            name, files = named, _open_base(checkpoint, named, hub or {})
        elif base is not None:
            raise AHNError(f"{checkpoint.path} is a merged checkpoint and brings its own base model: leave base out.")
        of_base = config or transformers_config(files.config, files.path)
        settings = checked_settings(checkpoint, of_base, str(name), **reach)
        given = None not in (reach.get("window"), reach.get("sinks"))
        return cls(name, files, checkpoint, settings, given, config)

    @property
    def adapter(self) -> Checkpoint | None:
        """Where the AHN is, if it is not beside the base weights."""
        return None if self.ahn is self.base else self.ahn

    def load(self, memory: bool = True, auto: Any = None, **kwargs: Any) -> PreTrainedModel:
        """The model in evaluation mode, with its AHN or, without `memory`, bare; `auto` and `kwargs` as `load`."""
        if self.config is not None:
            kwargs["config"] = self.config
        elif self.base.kind == "merged":
            config, kwargs = changed(transformers_config(self.base.config, self.base.path), kwargs)
            kwargs["config"] = config
        model = load_base(self.base.path, auto or _auto_class(base_config(self.base.config)), **kwargs)
        model.config.name_or_path = model.name_or_path = str(self.name)
        if self.base.kind == "merged":
            named = _named_base(self.base)
            setattr(model.config, BASE_NAME, None if named is None else str(named))
        if memory and self.settings is not None:
            if self.ahn is None:
                logging.getLogger("ahn").warning(
                    "No adapter is named: what is farther back than window and quantized tokens is forgotten."
                )
                attach(model, self.settings)
            else:
                attach_checked(model, self.ahn, self.settings, self.given)
        return model.eval()

    def load_ready(
        self, device: str | None = None, dtype: str | None = None, memory: bool = True
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model on its device, ready to read, and its tokenizer.

        Args:
            device: a torch device; None takes CUDA, else MPS, else the CPU.
            dtype: one of `DTYPES`; None takes float32 on a CPU and the checkpoint's own dtype elsewhere.
            memory: False leaves the AHN out.
        """
        if memory and self.settings is None:
            raise AHNError(
                f"{self.name} is a plain model without a memory; name an adapter for it with --adapter, or how many "
                "tokens to keep at a few bits with --quantized, which needs none."
            )
        place = pick_device(device)
        chosen = dtype or ("float32" if place.type == "cpu" else "auto")
        if chosen not in (*DTYPES, "auto"):
            raise AHNError(f"Unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}.")
        tokenizer = load_tokenizer(self.base.path)
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()  # of loading weights: noise in a log
        return self.load(memory, dtype=chosen).to(place), tokenizer


def _tier_alone(checkpoint: Checkpoint, **reach: Unpack[Reach]) -> AHNConfig | None:
    """Sinks, window and quantized tokens of a plain model, if some of these are wanted."""
    if not reach.get("quantized"):
        return None
    base = transformers_config(checkpoint.config, checkpoint.path)
    return overridden(AHNConfig.for_base(trained_length(base), memory="window_only"), **reach)


def _auto_class(config: dict[str, Any]) -> Any:
    """The Auto class that finds what a configuration was saved from; that of causal language models where unclear."""
    saved = config.get("architectures")
    name = str(saved[0]) if isinstance(saved, list) and saved else ""
    heads = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
    suffixes = {head.__name__.removeprefix("AutoModel"): head for head in heads} | {"Model": AutoModel}
    suffixes["ForConditionalGeneration"] = AutoModelForImageTextToText
    return next((found for suffix, found in suffixes.items() if name.endswith(suffix)), AutoModelForCausalLM)


def load_base(path: Path, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """Load with transformers; unlike there, an absent weight is an error, and AHN weights beside the base are none.

    Args:
        auto: the Auto class to load with. A head that the checkpoint lacks is new, as in transformers, unless it is
            that of a causal language model.
    """
    kwargs = {"trust_remote_code": False} | kwargs
    for name in ("dtype", "torch_dtype"):
        _check_dtype(kwargs.get(name))
    config = read_json(path / CONFIG)
    check_kernels(config, path / CONFIG)
    for name in ("dtype", "torch_dtype"):
        if not isinstance(config.get(name), str | dict | None):
            raise AHNError(f"{path / CONFIG}: {name} must be the name of a dtype, got {config[name]!r:.100}.")
    _check_beside(path)
    with _without_load_report():
        try:
            model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
        except _LOADING as error:
            raise unreadable(path, error) from error
    absent = sorted(info["missing_keys"])
    inside = f"{model.base_model_prefix}." if decoder_of(model) is not model else ""
    if auto is not AutoModelForCausalLM and absent and not any(name.startswith(inside) for name in absent):
        logging.getLogger("ahn").warning("%s has no %s: it is new, and has to be trained.", path, ", ".join(absent))
    elif absent:
        raise AHNError(f"{path} lacks {len(absent)} weights of {type(model).__name__}, the first is {absent[0]}.")
    unused = sorted(name for name in info["unexpected_keys"] if not is_ahn(name))
    if unused:
        logging.getLogger("ahn").warning("%s has %d unused weights, the first is %s.", path, len(unused), unused[0])
    return model


def _check_beside(path: Path) -> None:
    """Raises AHNError for files beside the weights with which transformers loads others, or goes on without a word."""
    if (path / PEFT_CONFIG).exists():
        raise AHNError(
            f"{path} holds a PEFT adapter beside its weights ({PEFT_CONFIG}), and transformers would load the base "
            "that it names instead of them: move one of the two away, or merge them (merge_and_unload)."
        )
    if not (path / GENERATION).exists():
        return
    settings = read_json(path / GENERATION)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = settings.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise AHNError(f"{path / GENERATION}: {name} must be a token's number, or a list, got {value!r:.100}.")


def _check_dtype(dtype: Any) -> None:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not isinstance(named, torch.dtype | dict):
        raise AHNError(f"Unknown dtype {dtype!r}: pass a torch.dtype, {', '.join(map(repr, DTYPES))} or 'auto'.")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model's weights."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError) as error:
        if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
            raise AHNError(f"{path} has no tokenizer beside its weights (tokenizer.json).") from None
        raise unreadable(path, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up when the files are absent
        raise AHNError(f"{path} has no tokenizer beside its weights (tokenizer.json).")
    return tokenizer


def pick_device(name: str | None) -> torch.device:
    """The torch device called `name`, or the fastest there is."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise AHNError(f"There is no device {name!r} here; `ahn env` lists what there is.") from None
    return device


def unreadable(path: PathLike, error: Exception) -> AHNError:
    """The first line of what transformers said about a model, as this package's error."""
    return AHNError(f"transformers cannot load {path}: {first_line(error)}")


def _open_base(adapter: Checkpoint, named: PathLike, hub: dict[str, Any]) -> Checkpoint:
    try:
        path = local_directory(named, **hub)
    except AHNError as error:
        raise AHNError(f"Base model of {adapter.path} not found, pass base=, a directory or Hub id. {error}") from error
    return Checkpoint.open(path).require("base")


def _named_base(checkpoint: Checkpoint) -> PathLike | None:
    """The base that a configuration names; a path that starts with a dot is relative to the checkpoint."""
    name = checkpoint.config.get(BASE_NAME) or checkpoint.config.get("_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    return Path(os.path.normpath(checkpoint.path / name)) if name.startswith(".") else name


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from listing the AHN's weights as unexpected."""
    source = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)
