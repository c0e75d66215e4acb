"""What `ahn train` can be told beyond the Trainer's own arguments: model, data and distillation, each checked alone."""

import dataclasses
from typing import Any

from ahn import memory
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.shape import DEFAULT_SLOTS
from ahn.training.losses import ATTENTION, parse_loss
from ahn.training.schedule import LINEAR_MINIMUM, SINKS, TOTALS, WindowDraw, WindowSchedule

PUBLISHED = "published"
"""`memory_horizons` that leaves heads as the paper's code begins them."""


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Settings:
    """Model, data and distillation of one run. Names are those of the published trainer where it has them."""

    model_name_or_path: str | None = _setting(None, "Base model: a directory, a Hub id, tiny or smollm2.")
    ahn_implementation: str = _setting(
        "GatedDeltaNet", f"Memory: {', '.join(str(memory.get(name).published_name) for name in memory.names())}."
    )
    use_ahn_router: bool = _setting(False, "Learn, per head, how much the memory's read counts as it fills.")
    use_q_proj: bool = _setting(False, "Learn, per head, a projection of the query that reads the memory.")
    memory_horizons: str = _setting(
        "256,16384",
        "In how many tokens heads begin to forget by a factor e: the shortest and the longest time, or published (the "
        "paper's start).",
    )
    memory_positions: int = _setting(
        0,
        "For RoutedDeltaNet, which sees positions: how far it will read. Samples then begin anywhere up to there (0: "
        "none does).",
    )
    fa_layer_ids: str | None = _setting(None, "Layers that keep full attention and get no memory, such as 0,1,27.")
    attn_implementation: str | None = _setting(None, "The base's attention kernel: sdpa, eager, flash_attention_2 …")
    window: int | None = _setting(
        None,
        "Window that the finished adapter asks for; loading it can choose another (default: 32640, or less).",
    )
    sinks: int | None = _setting(None, "Likewise its sinks (default: 128, or less).")
    slots: int = _setting(DEFAULT_SLOTS, "For RetainedTokens: tokens that it holds per layer and key head.")
    passage: int = _setting(1, "Likewise, how many tokens next to each other are kept or forgotten together.")
    score_layer: int | None = _setting(
        None,
        "Likewise, the layer that scores tokens for all heads of all layers (default: each layer its own).",
    )
    score_teachers: int = _setting(
        1, "With score_layer: from how many heads the score learns, those that find most of what replies say again."
    )

    dataset: str | None = _setting(
        None, "Training data: files, folders, Hub ids, chatqa2 or stdlib; several with commas between."
    )
    eval_dataset: str | None = _setting(None, "Held-out data, in the same forms.")
    val_size: float = _setting(0.0, "Instead of it: hold out this share (below 1) or number of the training rows.")
    max_eval_samples: int | None = _setting(None, "Measure on the first held-out samples only.")
    max_samples: int | None = _setting(None, "Take the first rows of each dataset only.")
    filter_len: int = _setting(288, "Leave out samples of this many tokens or fewer.")
    cutoff_len: int = _setting(24576, "Cut samples to this many tokens (plain text: into pieces of it).")
    streaming: bool = _setting(False, "Read and tokenise while training; for data larger than the disk.")
    strict: bool = _setting(False, "Stop at the first bad row instead of skipping it.")
    preprocessing_num_workers: int | None = _setting(None, "Processes that tokenise (default: one per core, up to 16).")
    overwrite_cache: bool = _setting(False, "Tokenise again even if it was done before.")

    loss_type: str | None = _setting(
        None, "kl (default), ce, distill (attention outputs), or a sum such as kl+ce; for RetainedTokens: attention."
    )
    use_normalized_l2: bool = _setting(False, "For distill: compare directions of attention outputs.")
    sliding_window_type: str = _setting("random", "How each step's lossless total is chosen: random, fixed or linear.")
    sliding_window: int | None = _setting(
        None, "Lossless total (sinks + window) in tokens: of every step if fixed, else of held-out evaluation alone."
    )
    ahn_position: str = _setting("random", "Sinks of each step: random, or prefix (none).")

    save_ahn_only: bool = _setting(True, "false: also write the merged model, OUTPUT/merged, at the end.")
    accept_changed_data: bool = _setting(
        False, "Resume although the samples or the tokenizer are not those that the run began with."
    )
    overwrite_output_dir: bool = _setting(False, "Start anew where an earlier run was saved; its checkpoints go.")
    plot_loss: bool = _setting(True, "Draw loss.png at the end.")

    notes: list[str] = dataclasses.field(default_factory=list, init=False)
    """What the user should know about these settings."""

    def __post_init__(self) -> None:
        self._check_present()
        self._check_numbers()
        self._check_loss()
        if self.use_normalized_l2 and "distill" not in str(self.loss_type):
            # The published script sets it with the loss "kl", where it changes nothing.
            self.notes.append("use_normalized_l2 changes nothing without the loss distill")
        if self.score_teachers != 1 and self.score_layer is None:
            self.notes.append("score_teachers changes nothing without score_layer")
        if self.max_eval_samples and not (self.eval_dataset or self.val_size):
            self.notes.append("max_eval_samples changes nothing without eval_dataset or val_size")
        if self.streaming and (self.overwrite_cache or self.preprocessing_num_workers):
            self.notes.append("overwrite_cache and preprocessing_num_workers change nothing for a stream")
        self._check_window()
        self.ahn_config  # noqa: B018  (raises)
        self.horizons  # noqa: B018  (raises)
        self._check_positions()
        self.schedule(seed=0)

    @property
    def ahn_config(self) -> AHNConfig:
        """What is known of the memory before there is a base."""
        return self.config_for(None)

    def config_for(self, trained: int | None) -> AHNConfig:
        """The memory to attach to a base, with the window and sinks of the finished adapter."""
        chosen_reach = {"window": self.window, "sinks": self.sinks}
        return AHNConfig.for_base(
            trained,
            **{name: value for name, value in chosen_reach.items() if value is not None},
            memory=self.memory_name,
            full_attention_layers=_layers(self.fa_layer_ids),
            router=self.use_ahn_router,
            q_proj=self.use_q_proj,
            slots=self.slots,
            passage=self.passage,
            score_layer=self.score_layer,
        )

    @property
    def memory_name(self) -> str:
        """The memory's name in `AHNConfig`."""
        name = self.ahn_implementation
        return name if name in memory.names() else memory.by_published_name(name).name

    @property
    def decays(self) -> bool:
        """Whether the memory's states decay."""
        return "decay" in memory.get(self.memory_name).closed_gates

    @property
    def horizons(self) -> tuple[float, float] | None:
        """`memory_horizons` as numbers; None for the published start."""
        if self.memory_horizons == PUBLISHED:
            return None
        try:
            shortest, longest = (float(part) for part in str(self.memory_horizons).split(","))
        except ValueError:
            shortest, longest = 0.0, 0.0
        if not 0 < shortest <= longest < float("inf"):
            raise AHNError(
                f"memory_horizons must be two numbers of tokens, the shorter first, such as 256,16384, or {PUBLISHED}; "
                f"got {self.memory_horizons!r}."
            )
        return shortest, longest

    def schedule(self, seed: int) -> WindowSchedule:
        """Draws each step's window, sinks and start."""
        total = self.sliding_window if self.sliding_window_type == "fixed" else None
        positions = self.memory_positions
        return WindowSchedule(self.sliding_window_type, self.ahn_position, total, positions=positions, seed=seed)

    @property
    def smallest_total(self) -> int:
        """No step keeps fewer tokens exactly, so a sample no longer than this never teaches anything."""
        if self.sliding_window_type == "fixed":
            return self.sliding_window or 0
        return LINEAR_MINIMUM if self.sliding_window_type == "linear" else min(TOTALS)

    @property
    def shortest(self) -> int:
        """Samples of this many tokens or fewer are left out."""
        return max(self.filter_len, self.smallest_total)

    @property
    def evaluation_draw(self) -> WindowDraw:
        """Window and sinks of held-out evaluation: always the same, so that its numbers can be compared."""
        total = self.sliding_window or max(total for total in TOTALS if 4 * total <= max(self.cutoff_len, 4 * 32))
        sinks = 0 if self.ahn_position == "prefix" else max(s for s in SINKS if 8 * s <= total)
        return WindowDraw(total - sinks, sinks)

    def _check_present(self) -> None:
        for name in ("model_name_or_path", "dataset"):
            if not getattr(self, name):
                raise AHNError(f"{name} is missing: name it in the configuration file or with --{name}.")
        if self.eval_dataset and self.val_size:
            raise AHNError("eval_dataset and val_size both say what is held out; leave one of them out.")

    def _check_loss(self) -> None:
        recurrent = self.memory_name in memory.recurrent()
        if self.loss_type is None:
            self.loss_type = "kl" if recurrent else ATTENTION
        if (self.loss_type == ATTENTION) == recurrent:
            learns = "kl, ce, distill or a sum of them" if recurrent else f"{ATTENTION} alone"
            raise AHNError(
                f"loss_type {self.loss_type} teaches {self.ahn_implementation} nothing: it learns by {learns}."
            )
        if not recurrent and (self.use_ahn_router or self.use_q_proj):
            raise AHNError(f"use_ahn_router and use_q_proj are for recurrent memories, not {self.ahn_implementation}.")
        if recurrent and (self.slots != DEFAULT_SLOTS or self.passage > 1 or self.score_layer is not None):
            raise AHNError(f"slots, passage and score_layer are for RetainedTokens, not {self.ahn_implementation}.")
        if self.score_layer is not None and self.streaming:
            raise AHNError(
                "score_layer needs samples that are there before training begins, to find its teachers in: leave "
                "streaming out."
            )
        if recurrent:
            parse_loss(self.loss_type)

    def _check_numbers(self) -> None:
        minima = {
            "cutoff_len": 2,
            "filter_len": 0,
            "max_samples": 1,
            "max_eval_samples": 1,
            "sliding_window": 2,
            "memory_positions": 0,
            "val_size": 0,
            "score_teachers": 1,
            "preprocessing_num_workers": 1,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise AHNError(f"{name} must be at least {minimum}, got {value}.")
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise AHNError(f"val_size must be a share below 1 or a whole number of rows, got {self.val_size}.")

    def _check_positions(self) -> None:
        sees = memory.get(self.memory_name).sees_positions
        if sees and self.memory_positions <= self.cutoff_len:
            self.notes.append(
                f"{self.ahn_implementation} sees positions, and learns none from cutoff_len {self.cutoff_len:,} on; "
                "to read longer texts with it, say how long with --memory_positions"
            )
        elif self.memory_positions and not sees:
            self.notes.append(f"memory_positions changes nothing for {self.ahn_implementation}, which sees distances")

    def _check_window(self) -> None:
        if self.sliding_window_type == "fixed" and self.sliding_window is None:
            raise AHNError("sliding_window_type fixed needs sliding_window, the lossless total in tokens.")
        if self.sliding_window is not None and self.sliding_window >= self.cutoff_len:
            raise AHNError(
                f"sliding_window {self.sliding_window} is not below cutoff_len {self.cutoff_len}, so nothing would "
                "leave the window; use a smaller window or longer samples."
            )
        if self.shortest >= self.cutoff_len:
            what = "filter_len" if self.filter_len >= self.smallest_total else f"{self.sliding_window_type} window"
            raise AHNError(
                f"cutoff_len {self.cutoff_len} cuts every sample to what the {what} leaves out ({self.shortest} tokens "
                "or fewer); use a larger cutoff_len."
            )
        if self.sliding_window_type == "random" and self.cutoff_len >= 8 * max(TOTALS):
            raise AHNError(
                f"sliding_window_type random draws totals up to {max(TOTALS)}, above an eighth of the samples: "
                f"cutoff_len must stay below {8 * max(TOTALS)}, or use fixed or linear."
            )


def _layers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in (text or "").replace(",", " ").split())
    except ValueError:
        raise AHNError(f"fa_layer_ids must list layer indices such as 0,1,27; got {text!r}.") from None
