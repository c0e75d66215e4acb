"""The model card and the loss curves of a finished run."""

from pathlib import Path
from typing import Any

from ahn.config import AHNConfig
from ahn.files import expanded, write_text
from ahn.measure import plots
from ahn.model.pushing import licence_of
from ahn.training.arguments import Arguments
from ahn.training.looks import SHARES
from ahn.training.losses import ATTENTION

CARD = """---
library_name: ahn
tags: [long-context, artificial-hippocampus-network]{base_tag}
---

# {title}

An Artificial Hippocampus Network (arXiv 2510.07318) for `{base}`: a memory of fixed size for the tokens that leave the
window. Kind {memory}, {parameters:.2f} M parameters; the base model is unchanged and not part of this folder.

```python
import ahn

model = ahn.from_pretrained("{folder}")  # window {window:,} + {sinks:,} sinks; window= and sinks= choose others
```

## Training

{learns} (loss `{loss}`), on `{dataset}`, {steps:,} steps of {rows:,} samples of up to {cutoff:,} tokens;
{window_rule}; AdamW, peak learning rate {lr:g}, {scheduler}. Seed {seed}.
{evaluation}
{figure}"""

DISTILLED = "Self-distillation: the memory learns to give what the same model gives with full attention"
SCORED = "The memory learns which tokens the same model, with full attention, looks at from beyond the window"

SCORES = """
## Held-out data

Window {eval_window:,} + {eval_sinks:,} sinks, {eval_positions:,} tokens that a query beyond it sees. The recall is the
share of the tokens looked at most ({share:.0%}) that the highest scores find.

| | cross entropy (nats) | recall |
|---|---|---|
{rows}
"""

EVALUATION = """
## Held-out data

Window {eval_window:,} + {eval_sinks:,} sinks, {eval_positions:,} positions beyond it, nats per token. The gap is what
the student's cross entropy loses against full attention.

| | KL to full attention | cross entropy | full attention | gap |
|---|---|---|---|---|
{rows}
"""


def write_card(
    path: Path,
    arguments: Arguments,
    config: AHNConfig,
    parameters: int,
    results: dict[str, Any],
) -> None:
    """`README.md` of a finished adapter.

    Args:
        results: steps done, and held-out metrics before (sinks + window) and after (the trained memory).
    """
    settings, trainer = arguments
    base = str(settings.model_name_or_path)
    licence = licence_of(base)
    is_hub = "/" in base and not expanded(base).exists()
    fixed = {"fixed": f"lossless total {settings.sliding_window}", "linear": "lossless total a quarter of the samples"}
    text = CARD.format(
        base_tag=(f"\nbase_model: {base}" if is_hub else "") + (f"\nlicense: {licence}" if licence else ""),
        title=path.resolve().name,
        folder=path.resolve().name,
        base=base,
        memory=settings.ahn_implementation,
        parameters=parameters / 1e6,
        window=config.window,
        sinks=config.sinks,
        learns=SCORED if settings.loss_type == ATTENTION else DISTILLED,
        loss=settings.loss_type,
        dataset=settings.dataset,
        steps=results["steps"],
        rows=trainer.train_batch_size * trainer.gradient_accumulation_steps * trainer.world_size,
        cutoff=settings.cutoff_len,
        window_rule=fixed.get(settings.sliding_window_type, "window and sinks drawn anew for each step"),
        lr=trainer.learning_rate,
        scheduler=trainer.lr_scheduler_type.value,
        seed=trainer.seed,
        evaluation=_evaluation(results["before"], results["after"]),
        figure="![Loss curves](loss.png)\n" if settings.plot_loss else "",
    )
    write_text(path / "README.md", text)


def _evaluation(before: dict[str, float] | None, after: dict[str, float] | None) -> str:
    if after is None:
        return ""
    if "eval_recall" in after:
        found = [("untrained", before), ("trained", after)]
        scored = [f"| {name} | {x['eval_loss']:.4f} | {x['eval_recall']:.4f} |" for name, x in found if x is not None]
        return SCORES.format(rows="\n".join(scored), share=SHARES[0], **after)
    lines = [("sinks + window", before), ("with the memory", after)]
    rows = [
        "| {} | {:.4f} | {:.4f} | {:.4f} | {:.4f} |".format(
            name, *(found[f"eval_{key}"] for key in ("kl", "ce", "teacher_ce", "gap"))
        )
        for name, found in lines
        if found is not None
    ]
    return EVALUATION.format(rows="\n".join(rows), **after)


DISTILLATION_CURVES = (
    ({"kl": plots.AHN}, "KL to full attention (nats per token)"),
    ({"ce": plots.AHN, "teacher_ce": plots.FULL}, "Cross entropy (nats per token)"),
)
SCORE_CURVES = (
    ({"loss": plots.AHN}, "Cross entropy of scores (nats)"),
    ({"recall": plots.AHN}, f"Share found of the {SHARES[0]:.0%} looked at most"),
)
LABELS = {"kl": "student", "ce": "student", "teacher_ce": "full attention", "loss": "scores", "recall": "scores"}


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Losses by step, from the Trainer's log; held-out values as points."""
    training = [entry for entry in history if {"kl", "recall"} & entry.keys()]
    held_out = [entry for entry in history if "eval_loss" in entry]
    scored = any("recall" in entry for entry in training)
    curves, title = (SCORE_CURVES, "Scores") if scored else (DISTILLATION_CURVES, "Self-distillation")
    figure, axes = plots.new_figure(2, title)
    for axis, (names, title) in zip(axes, curves, strict=True):
        for name, colour in names.items():
            label = LABELS[name]
            style = {"color": colour, "label": label, "linewidth": plots.WIDTH}
            axis.plot([e["step"] for e in training], [e[name] for e in training], **style)
            points = [e[f"eval_{name}"] for e in held_out]
            axis.plot([e["step"] for e in held_out], points, "o", color=colour, ms=5, label=f"{label}, held out")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
    plots.finish(figure, axes)
    plots.save(figure, path)
