"""`DistillationTrainer`: Hugging Face's Trainer where a step is self-distillation and a checkpoint is a memory.

What differs from the Trainer: window and sinks are drawn once per step, the same for every micro-batch and rank; losses
are sums over the positions that count, divided by their number in the whole step; batches stay on the CPU until the
model reads them; checkpoints are those of `ahn.training.checkpoints`.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl

from ahn.checkpoint.directory import short_name
from ahn.config import AHNConfig
from ahn.errors import AHNError
from ahn.files import write_json
from ahn.private import overrides_trainer
from ahn.training import checkpoints
from ahn.training.arguments import TrainerArguments
from ahn.training.data import Collator, Data, lengthened
from ahn.training.losses import ATTENTION, IGNORED, nothing_counts
from ahn.training.meter import StepMeter, with_gap
from ahn.training.schedule import WindowDraw, WindowSchedule
from ahn.training.sharding import is_true
from ahn.training.student import MicroBatch, Student


@dataclasses.dataclass(frozen=True)
class Step:
    """What all micro-batches of one optimiser step share."""

    draw: WindowDraw
    count: int
    """Positions that count, over all micro-batches and ranks."""


@overrides_trainer
class DistillationTrainer(Trainer):
    """Trains the memory of a `Student`.

    Args:
        evaluation: window and sinks of held-out evaluation.
        config: of the memory, with the window and sinks that checkpoints ask for.
        settings: what checkpoints note, and a resumed run is compared with; JSON types.
    """

    args: TrainerArguments
    control: TrainerControl
    loss_is_scaled_for_ga = True  # a loss is the micro-batch's share of the step already

    def __init__(
        self,
        student: Student,
        args: TrainerArguments,
        data: Data,
        schedule: WindowSchedule,
        evaluation: WindowDraw,
        config: AHNConfig,
        pad_token_id: int,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(
            model=student,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=Collator(pad_token_id),
        )
        if is_true(os.environ.get("ACCELERATE_USE_FSDP")) and not self.is_fsdp_enabled:
            raise AHNError("FSDP was asked for, but accelerate shards weights on GPUs only; leave fsdp out.")
        if self.is_fsdp_enabled and student.loss == ATTENTION:
            raise AHNError(f"The loss {ATTENTION} cannot train a sharded model: leave fsdp out.")
        self.student, self.schedule, self.evaluation = student, schedule, evaluation
        self.config, self.pad_token_id, self.settings = config, pad_token_id, settings
        self.meter = StepMeter()
        self._step: Step | None = None

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        samples = self.train_dataset
        streamed = not isinstance(samples, Dataset)
        loader = DataLoader(
            samples,
            batch_size=self.args.per_device_train_batch_size,
            sampler=None if streamed else self._get_train_sampler(samples),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            drop_last=self.args.dataloader_drop_last,
        )
        # A stream was divided between the ranks when it was opened.
        return loader if streamed else self.accelerator.prepare_data_loader(loader, device_placement=False)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], int | None]:
        """The micro-batches of one step, and how many positions count in all of them together."""
        self.meter.start()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        own = [sum(int(b["attention_mask"].sum()) for b in batches), sum(len(b["input_ids"]) for b in batches)]
        tokens, rows = self._over_ranks(own)
        draw = self.schedule.draw(self.state.global_step, int(tokens // rows))
        batches = [lengthened(batch, draw.lossless + 1, self.pad_token_id) for batch in batches]
        (count,) = self._over_ranks([sum(self.student.counting(b, draw.window, draw.sinks) for b in batches)])
        if not count:
            raise nothing_counts(draw.lossless, max(batch["input_ids"].shape[1] for batch in batches))
        self._step = Step(draw, int(count))
        self.meter.note(draw, int(tokens))
        return batches, int(count)

    def _over_ranks(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all ranks; counts up to 2^53 stay exact."""
        if self.args.world_size == 1:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(own, "sum").tolist()

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs  # on the CPU: which positions count is then known without waiting for the device

    # ---- a step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert self._step is not None
        draw = self._step.draw
        found = model(MicroBatch(inputs, draw.window, draw.sinks, self._step.count, draw.start))
        self.meter.add(found)
        return found.loss * self.args.world_size  # DDP and FSDP divide gradients by the number of ranks

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; norms, biases and decay rates are vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(torch.as_tensor(norm)):
            raise AHNError(
                f"Step {self.state.global_step + 1}: the gradient's norm is {float(norm)}. The memory is as it was "
                f"before this step; lower learning_rate, or look at the data of this step. {self._last_kept()}"
            )
        return norm

    def _last_kept(self) -> str:
        kept = checkpoints.numbered(Path(self.args.output_dir))
        return f"{kept[0]} is kept: --resume_from_checkpoint true goes on from it." if kept else "No checkpoint yet."

    # ---- numbers ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self.accelerator)
        super().log({name: _rounded(value) for name, value in logs.items()}, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses on held-out samples with one fixed window; every rank takes its share of the batches."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise AHNError("There is no held-out data: name eval_dataset or val_size.")
        self.model.eval()
        start, names = time.perf_counter(), ("loss",)
        sums = torch.zeros((), dtype=torch.float64)
        for batch in self._held_out_batches(samples):
            found = self.model(MicroBatch(batch, self.evaluation.window, self.evaluation.sinks, count=1))
            names = found._fields[:-1]
            sums = sums + torch.tensor([*(float(x) for x in found[:-1]), found.valid], dtype=torch.float64)
        *totals, count = self._over_ranks(sums.tolist())
        if not count:
            raise nothing_counts(self.evaluation.lossless, max(len(row) for row in samples["input_ids"]))
        found_metrics = with_gap({name: total / count for name, total in zip(names, totals, strict=True)})
        if not math.isfinite(found_metrics["loss"]):
            raise AHNError(
                f"Held-out data after step {self.state.global_step}: the loss is {found_metrics['loss']} (teacher's "
                f"cross entropy {found_metrics.get('teacher_ce')}). If the teacher's is not finite either, the base's "
                f"numbers overflow: use --bf16 true. {self._last_kept()}"
            )
        found_metrics |= {"window": self.evaluation.window, "sinks": self.evaluation.sinks, "positions": int(count)}
        found_metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": _rounded(value) for name, value in found_metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_batches(self, samples: Dataset) -> Iterator[dict[str, Tensor]]:
        size, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        batches = -(-len(samples) // size)
        for first in range(0, batches, ranks):
            number = first + self.args.process_index
            begin = size * (number % batches)
            rows = [samples[row] for row in range(begin, min(begin + size, len(samples)))]
            batch = lengthened(self.data_collator(rows), self.evaluation.lossless + 1, self.pad_token_id)
            if number >= batches:  # ranks whose share is shorter still take part: a sharded model needs all of them
                batch["labels"].fill_(IGNORED)
            yield batch

    # ---- checkpoints ----

    def _names(self) -> dict[Tensor, str]:
        return {parameter: short_name(name) for name, parameter in self.student.memory().items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        temporary, first = checkpoints.partial(output, step), self.is_world_process_zero()
        if first:
            checkpoints.remove([temporary])
        self.accelerator.wait_for_everyone()
        temporary.mkdir(parents=True, exist_ok=True)
        self.write_memory(temporary)
        checkpoints.write_optimizer(self.optimizer.optimizer, self._names(), temporary if first else None)
        checkpoints.write_rng(temporary, self.args.process_index)
        if first:
            noted = {"scheduler": self.lr_scheduler.state_dict(), "settings": self.settings}
            write_json(temporary / checkpoints.TRAINING, noted)
            self.state.save_to_json(str(temporary / checkpoints.STATE))
        self.accelerator.wait_for_everyone()
        if first:
            checkpoints.remove(path for path in [checkpoints.folder(output, step)] if path.exists())
            temporary.rename(checkpoints.folder(output, step))
            if self.args.save_total_limit:
                checkpoints.remove(checkpoints.numbered(output)[self.args.save_total_limit :])

    def write_memory(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """The memory as an adapter; every rank must ask, the first one writes."""
        checkpoints.write_memory(self.student.model, self.config, path if self.is_world_process_zero() else None, dtype)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the memory's weights were read before the model was wrapped."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint)
        checkpoints.load_optimizer(self.optimizer.optimizer, self._names(), path)
        self.lr_scheduler.load_state_dict(json.loads((path / checkpoints.TRAINING).read_text())["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_rng(Path(checkpoint), self.args.process_index)


def _rounded(value: Any) -> Any:
    """Six digits: enough to compare, few enough to read."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
