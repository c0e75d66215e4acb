"""A whole run, from arguments to a finished adapter: check, read data, load, train, measure, write."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from ahn.checkpoint import shipped
from ahn.checkpoint.adapter import RESULTS
from ahn.checkpoint.directory import DESCRIPTION, Checkpoint
from ahn.checkpoint.hub import local_directory
from ahn.checkpoint.loading import load_base, load_tokenizer
from ahn.checkpoint.merging import merge
from ahn.costs import count_parameters
from ahn.decode.compiled import leaves_fused
from ahn.errors import AHNError
from ahn.files import check_folder, write_json
from ahn.memory.horizons import start_with_horizons
from ahn.model.adapter import attach
from ahn.shape import ModelShape, trained_length
from ahn.training import checkpoints
from ahn.training.arguments import Arguments, TrainerArguments
from ahn.training.card import draw_curves, write_card
from ahn.training.data import Collator, Data, Stream, check_tokenizer, load_data
from ahn.training.heads import copied, most_copying
from ahn.training.looks import Teachers
from ahn.training.settings import Settings
from ahn.training.sharding import is_true
from ahn.training.student import Student
from ahn.training.trainer import DistillationTrainer

logger = logging.getLogger("ahn")

DIGESTS = "data_digests"
"""Name, among the settings in a checkpoint, of what tells its samples and tokenizer from others."""
TEACHERS = "teachers"
"""Likewise, of the heads from which a score for all heads learns."""
ASKED = 32
"""Samples whose replies tell which heads these are."""
FREE = (
    "notes",
    "accept_changed_data",
    "overwrite_output_dir",
    "overwrite_cache",
    "preprocessing_num_workers",
    "plot_loss",
    "save_ahn_only",
)
"""Settings that change no number of a run."""
SHARED = (
    *("seed", "data_seed", "bf16", "learning_rate", "weight_decay", "warmup_steps", "max_steps", "optim"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "world_size"),
)
"""The Trainer's arguments that do."""


def run(arguments: Arguments, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, and write the adapter with its card and curves into `output_dir`.

    Returns:
        What `results.json` holds: steps, and held-out metrics before and after, as far as there are any.
    """
    settings, trainer_arguments = arguments
    for note in settings.notes:
        logger.info("%s.", note)
    with trainer_arguments.main_process_first(desc="checking"):
        check_folder(Path(trainer_arguments.output_dir))
        checkpoint = starting_point(settings, trainer_arguments)
        base = base_directory(settings)
        tokenizer = load_tokenizer(base)
        check_tokenizer(tokenizer)
        check_sizes(settings, base, tokenizer)
        data = load_data(
            settings, tokenizer, trainer_arguments.seed, trainer_arguments.process_index, trainer_arguments.world_size
        )
    if checkpoint is not None:
        check_same_data(checkpoint, data.digests, settings.accept_changed_data)
    set_seed(trainer_arguments.seed)  # the new memory is the same on every rank
    model = load_model(settings, trainer_arguments, base)
    if checkpoint is not None:
        checkpoints.load_memory(model, checkpoint)
        before = checkpoints.read_run_settings(checkpoint)
        began = before["memory_horizons"]
        if began != settings.memory_horizons and settings.decays:
            logger.info("memory_horizons stays %s: it says how a run begins.", began)
        settings.memory_horizons = began
        for change in checkpoints.changed_settings(before, shared_settings(arguments)):
            logger.warning("resuming with another setting than before: %s.", change)
        logger.info("resuming from %s.", checkpoint)
    teachers = score_teachers(model, settings, data, checkpoint)
    trainer = DistillationTrainer(
        Student(model, str(settings.loss_type), settings.use_normalized_l2, teachers=teachers),
        trainer_arguments,
        data,
        settings.schedule(trainer_arguments.seed),
        settings.evaluation_draw,
        settings.config_for(trained_length(model.config)),
        tokenizer.pad_token_id or 0,
        shared_settings(arguments) | {DIGESTS: data.digests, TEACHERS: teachers},
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    with leaves_fused(model):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except BaseException:  # a full disk, Ctrl-C: a checkpoint that was being written is of no use
            if trainer.is_world_process_zero():
                checkpoints.clear_partial(Path(trainer_arguments.output_dir))
            raise
    after = None
    if data.held_out is not None:
        entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        done = bool(entries) and entries[-1]["step"] == trainer.state.global_step
        after = entries[-1] if done else trainer.evaluate()
    return finish(trainer, arguments, after)


def finish(trainer: DistillationTrainer, arguments: Arguments, after: dict[str, float] | None) -> dict[str, Any]:
    """Write the adapter in the base's precision, its card, the curves, the log, and the merged model if asked for."""
    settings, output = arguments.settings, Path(arguments.trainer.output_dir)
    model, history = trainer.student.model, trainer.state.log_history
    config = settings.config_for(trained_length(model.config))
    trainer.write_memory(output, _dtype(arguments.trainer))
    before = next((entry for entry in history if "eval_loss" in entry and entry["step"] == 0), None)
    results = {"steps": trainer.state.global_step, "before": before, "after": after}
    if trainer.is_world_process_zero():
        write_card(output, arguments, config, count_parameters(model.config, config), results)
        if settings.plot_loss:
            draw_curves(history, output / "loss.png")
        trainer.state.save_to_json(str(output / checkpoints.STATE))
        write_json(output / RESULTS, results)
        if not settings.save_ahn_only:
            merge(base_directory(settings), output, output / "merged")
    trainer.accelerator.wait_for_everyone()
    return results


def starting_point(settings: Settings, trainer: TrainerArguments) -> Path | None:
    """The checkpoint to go on from, or None to start anew."""
    output, wanted = Path(trainer.output_dir), trainer.resume_from_checkpoint
    if wanted is not None and not is_true(wanted) and str(wanted).lower() not in ("false", "no"):
        problem = checkpoints.damage(Path(wanted))
        if problem:
            raise AHNError(f"Cannot resume from {wanted}: {problem}")
        return Path(wanted)
    checkpoints.clear_partial(output)
    found = checkpoints.last_good(output)
    if is_true(wanted):
        if found is None:
            logger.info("%s has no checkpoint to resume from; the run starts.", output)
        return found
    earlier = [*checkpoints.numbered(output), *(p for p in (output / "model.safetensors",) if p.exists())]
    if earlier and not settings.overwrite_output_dir:
        raise AHNError(
            f"{output} holds an earlier run ({earlier[0].name}): go on with --resume_from_checkpoint true, start anew "
            "with --overwrite_output_dir true, or choose another output_dir."
        )
    checkpoints.remove(checkpoints.numbered(output))
    return None


def check_same_data(checkpoint: Path, digests: dict[str, str], accepted: bool) -> None:
    """Raises AHNError if a run would go on with other samples than it began with, unless that is accepted."""
    before = checkpoints.read_run_settings(checkpoint).get(DIGESTS)
    if not isinstance(before, dict):
        logger.info(
            "%s is of a time when checkpoints did not note their data; nothing tells if it changed.", checkpoint
        )
        return
    changed = [name for name in digests if before.get(name) != digests[name]]
    if not changed:
        return
    what = (
        "tokenizer or its chat template" if "tokenizer" in changed else "training samples (files, or how they are cut)"
    )
    message = f"The {what} changed since {checkpoint} was written"
    if not accepted:
        raise AHNError(
            f"{message}: bring back what was there, start anew in another output_dir, or go on with "
            "--accept_changed_data true."
        )
    logger.warning("%s; going on as asked.", message)


def base_directory(settings: Settings) -> Path:
    """Where the base model's files are; downloaded if need be."""
    name = str(settings.model_name_or_path)
    path = local_directory(shipped.resolve(name))
    kind = Checkpoint.open(path).kind
    if kind != "base":
        raise AHNError(f"{name} holds {DESCRIPTION[kind]}; a new memory is trained on {DESCRIPTION['base']}.")
    return path


def check_sizes(settings: Settings, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises AHNError if the model has no embedding for some token, or was not made for samples or positions as far."""
    whole = AutoConfig.from_pretrained(base, trust_remote_code=False)
    wanted = settings.ahn_config
    wanted.check_layers(ModelShape.from_config(whole).memory_layers(wanted.full_attention_layers))  # both raise
    kernel = settings.attn_implementation
    if kernel and "/" not in kernel and kernel not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        raise AHNError(f"attn_implementation {kernel} is no attention kernel of transformers: try sdpa or eager.")
    config = whole.get_text_config(decoder=True)
    if len(tokenizer) > config.vocab_size:
        raise AHNError(
            f"The tokenizer in {base} has {len(tokenizer)} tokens, the model embeddings for {config.vocab_size}: they "
            "do not belong together."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and settings.cutoff_len > limit:
        raise AHNError(
            f"cutoff_len {settings.cutoff_len} is beyond the {limit} positions that the model was made for: its full "
            "attention would be a bad teacher there."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if limit is not None and settings.memory_positions > limit and rope in ("dynamic", "longrope"):
        raise AHNError(
            f"memory_positions {settings.memory_positions} is beyond the {limit} positions the model was made for. Its "
            f"rotation ({rope}) changes there, and with it the teacher: name at most {limit}."
        )


def load_model(settings: Settings, trainer: TrainerArguments, base: Path) -> PreTrainedModel:
    """The base in bfloat16 (`bf16`) or float32, with a new memory in float32."""
    place = (
        {"device_map": {"": trainer.device}}
        if trainer.device.type == "cuda" and not is_true(os.environ.get("ACCELERATE_USE_FSDP"))
        else {}
    )
    model = load_base(base, dtype=_dtype(trainer), attn_implementation=_kernel(settings), **place)
    model.config.name_or_path = model.name_or_path = shipped.base_name(str(settings.model_name_or_path))
    trained = trained_length(model.config)
    config = settings.config_for(trained)
    if None in (settings.window, settings.sinks):
        logger.info("window %d, sinks %d: they follow the base, trained on %s.", config.window, config.sinks, trained)
    attach(model, config)
    if settings.horizons is not None:
        start_with_horizons(model, *settings.horizons)
    return model


def score_teachers(model: PreTrainedModel, settings: Settings, data: Data, checkpoint: Path | None) -> Teachers:
    """The heads that teach `score_layer`: those of the checkpoint, or those that find most in the first samples."""
    if settings.score_layer is None:
        return ()
    if checkpoint is not None:
        return tuple((layer, head) for layer, head in checkpoints.read_run_settings(checkpoint)[TEACHERS])
    collate, draw, samples = Collator(0), settings.evaluation_draw, data.train
    assert not isinstance(samples, Stream)  # by `Settings`
    batches = (collate([samples[row]]) for row in range(min(ASKED, len(samples))))
    found = [most_copying(copied(model, batches, draw.window, draw.sinks), settings.score_teachers)]
    teachers: Teachers = broadcast_object_list(found)[0]  # the same in all processes, whatever the last digits
    names = " ".join(f"{layer}.{head}" for layer, head in teachers)
    logger.info("layer %d scores tokens for all heads, taught by %s (layer.head).", settings.score_layer, names)
    return teachers


def shared_settings(arguments: Arguments) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON types: a resumed run should have the same."""
    settings = {name: v for name, v in dataclasses.asdict(arguments.settings).items() if name not in FREE}
    trainer = {name: getattr(arguments.trainer, name) for name in SHARED}
    return settings | trainer | {"lr_scheduler_type": arguments.trainer.lr_scheduler_type.value}


def _kernel(settings: Settings) -> str | None:
    if settings.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        logger.warning("flash_attention_2 is not installed; the base model's own choice of kernel is used.")
        return None
    return settings.attn_implementation


def _dtype(trainer: TrainerArguments) -> torch.dtype:
    return torch.bfloat16 if trainer.bf16 else torch.float32
