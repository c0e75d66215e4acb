"""The model card and the loss curves of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ahn.config import AHNConfig
from ahn.files import write_text
from ahn.measure import plots
from ahn.training.arguments import Arguments

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

Self-distillation: the memory learns to give what the same model gives with full attention (loss `{loss}`), on
`{dataset}`, {steps:,} steps of {rows:,} samples of up to {cutoff:,} tokens; {window_rule}; AdamW, peak learning rate
{lr:g}, {scheduler}. Seed {seed}.
{evaluation}
{figure}"""

EVALUATION = """
## Held-out data

Window {eval_window:,} + {eval_sinks:,} sinks, {eval_positions:,} positions beyond it, nats a token. The gap is what
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
    steps: int,
    rows: int,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
) -> None:
    """`README.md` of a finished adapter.

    Args:
        path: the adapter's folder.
        arguments, config: of the run.
        parameters: of the memory.
        steps: optimiser steps done.
        rows: samples a step.
        before, after: held-out metrics of sinks + window and of the trained memory.
    """
    settings, trainer = arguments
    base = str(settings.model_name_or_path)
    is_hub = "/" in base and not Path(base).expanduser().exists()
    fixed = {"fixed": f"lossless total {settings.sliding_window}", "linear": "lossless total a quarter of the samples"}
    text = CARD.format(
        base_tag=f"\nbase_model: {base}" if is_hub else "",
        title=path.resolve().name,
        folder=path.resolve().name,
        base=base,
        memory=settings.ahn_implementation,
        parameters=parameters / 1e6,
        window=config.window,
        sinks=config.sinks,
        loss=settings.loss_type,
        dataset=settings.dataset,
        steps=steps,
        rows=rows,
        cutoff=settings.cutoff_len,
        window_rule=fixed.get(settings.sliding_window_type, "window and sinks drawn anew for each step"),
        lr=trainer.learning_rate,
        scheduler=trainer.lr_scheduler_type.value,
        seed=trainer.seed,
        evaluation=_evaluation(before, after),
        figure="![Loss curves](loss.png)\n" if settings.plot_loss else "",
    )
    write_text(path / "README.md", text)


def _evaluation(before: dict[str, float] | None, after: dict[str, float] | None) -> str:
    if after is None:
        return ""
    lines = [("sinks + window", before), ("with the memory", after)]
    rows = [
        "| {} | {:.4f} | {:.4f} | {:.4f} | {:.4f} |".format(
            name, *(found[f"eval_{key}"] for key in ("kl", "ce", "teacher_ce", "gap"))
        )
        for name, found in lines
        if found is not None
    ]
    return EVALUATION.format(rows="\n".join(rows), **after)


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """KL and cross entropies by step, from the Trainer's log; held-out values as points."""
    training = [entry for entry in history if "kl" in entry]
    held_out = [entry for entry in history if "eval_kl" in entry]
    figure, (left, right) = plots.new_figure(2, "Self-distillation")
    for axis, names, title in (
        (left, {"kl": plots.AHN}, "KL to full attention (nats a token)"),
        (right, {"ce": plots.AHN, "teacher_ce": plots.FULL}, "Cross entropy (nats a token)"),
    ):
        for name, colour in names.items():
            label = {"kl": "student", "ce": "student", "teacher_ce": "full attention"}[name]
            axis.plot([e["step"] for e in training], [e[name] for e in training], color=colour, lw=1.5, label=label)
            points = [e[f"eval_{name}"] for e in held_out]
            axis.plot([e["step"] for e in held_out], points, "o", color=colour, ms=5, label=f"{label}, held out")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=9)
    plots.save(figure, path)
