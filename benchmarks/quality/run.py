"""What a memory is worth: make a base model, distil memories onto it, measure them, draw the figures.

    python benchmarks/quality/run.py --out runs/quality                     # everything that is not done yet
    python benchmarks/quality/run.py prepare base --out runs/quality        # some stages
    python benchmarks/quality/run.py distill evaluate --out runs/quality --jobs 8       # in eight processes
    python benchmarks/quality/run.py report --out runs/quality

Stages are prepare (CPU: corpus, tokenizer, token ids), base (the base model), distill (a memory of each run), evaluate
(all of them and the baselines) and report (results.jsonl, tables, figures). What has been done is not done again.

With --jobs N every row is trained and measured in a process of its own, N at once, spread over all GPUs.

`--recipe tiny` makes ahn-tiny, the model that ships with the package; its last stage, `card`, has to be named: it
writes the model card and copies everything into the package. `--smoke` is a shape that a CPU finishes in a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    stages = list(options.stages or STAGES)
    for stage in stages:
        if options.jobs > 1 and stage in ROWS:
            if stage == next(each for each in stages if each in ROWS):
                _rows(options, out, [each for each in stages if each in ROWS])
        else:
            RUN[stage](options, out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line to options; `recipe` is the recipe itself."""
    from stages.recipe import BASELINES
    from stages.recipes import RECIPES, smoke

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (all), or card")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of this study")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="study")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to check the stages themselves")
    parser.add_argument("--corpus", type=Path, action="append", default=[], help="a folder of packages to read instead")
    parser.add_argument("--seconds", type=float, help="base: shorten training so that it ends by then")
    parser.add_argument("--device", help="cuda:0, cpu, ...; default: a GPU if there is one")
    parser.add_argument("--only", type=_names, default=(), help="distill, evaluate: these rows only, a,b,...")
    parser.add_argument("--seeds", type=_numbers, default=(), help="distill, evaluate: these seeds only, 0,1,...")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="distill, evaluate: so many rows at once (two a GPU are good)"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    unknown = set(options.stages) - set(RUN)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(RUN)}")
    if "card" in options.stages and options.recipe != "tiny":
        parser.error("the card is ahn-tiny's: name --recipe tiny")
    recipe = RECIPES[options.recipe]
    options.recipe = smoke(recipe) if options.smoke else recipe
    known = {run.name for run in options.recipe.runs}
    missing = set(options.only) - known - set(BASELINES)
    if missing:
        parser.error(f"the recipe has no run {', '.join(sorted(missing))}; it has {', '.join(sorted(known))}")
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _device(options: argparse.Namespace) -> Any:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _prepare(options: argparse.Namespace, out: Path) -> None:
    from stages.prepare import DONE, prepare

    if not (out / DONE).exists():
        prepare(options.recipe, out, options.corpus)


def _base(options: argparse.Namespace, out: Path) -> None:
    from stages.base import DONE, train_base

    if not (out / DONE).exists():
        train_base(options.recipe, out, _device(options), options.seconds)


def _distill(options: argparse.Namespace, out: Path) -> None:
    from stages.distill import distill_memory, marker
    from stages.recipe import tasks

    for task in tasks(options.recipe, options.only, options.seeds):
        if not marker(out, task).exists():
            distill_memory(options.recipe, out, task, _device(options))


def _evaluate(options: argparse.Namespace, out: Path) -> None:
    from stages.evaluate import evaluate
    from stages.recipe import tasks, untrained

    chosen = [*tasks(options.recipe, options.only, options.seeds), *untrained(options.recipe, options.only)]
    evaluate(options.recipe, out, chosen, _device(options))


def _rows(options: argparse.Namespace, out: Path, stages: list[str]) -> None:
    """Distill and evaluate, or one of them, a process a row."""
    import torch
    from stages import workers
    from stages.evaluate import rows_file
    from stages.recipe import tasks, training, untrained

    command = [sys.executable, __file__, *stages, "--out", str(out), "--recipe", options.recipe.name]
    command += ["--smoke"] if options.smoke else []
    rows = tasks(options.recipe, options.only, options.seeds)
    rows += untrained(options.recipe, options.only) if "evaluate" in stages else []
    jobs = []
    for task in rows:
        if rows_file(out, task).exists():
            continue
        chosen = ["--only", task.run.name, *([] if task.seed is None else ["--seeds", str(task.seed)])]
        needed = training(task)
        after = None if needed is None or task.seed is not None else needed.name
        jobs.append(workers.Job(task.name, [*command, *chosen], after))
    if options.device is not None:
        devices = [options.device]
    else:
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    failed = workers.run(jobs, [devices[index % len(devices)] for index in range(options.jobs)])
    if failed:
        raise SystemExit(f"Not done: {', '.join(failed)}. What they printed is above; the same command tries again.")


def _report(options: argparse.Namespace, out: Path) -> None:
    from stages.report import report

    report(options.recipe, out)


def _card(options: argparse.Namespace, out: Path) -> None:
    from stages.card import install, write_card

    write_card(options.recipe, out)
    if not options.smoke:
        install(options.recipe, out)


STAGES = {"prepare": _prepare, "base": _base, "distill": _distill, "evaluate": _evaluate, "report": _report}
"""What a command without stages does, in this order."""
ROWS = ("distill", "evaluate")
"""What --jobs shares out."""
RUN = STAGES | {"card": _card}


if __name__ == "__main__":
    main()
