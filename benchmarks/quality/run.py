"""What a memory is worth: make a base model, distil memories onto it, measure them, draw the figures.

    python benchmarks/quality/run.py --out runs/quality                     # everything that is not done yet
    python benchmarks/quality/run.py prepare base --out runs/quality        # some stages
    python benchmarks/quality/run.py --out runs/quality --only full,window_only,deltanet --seeds 0

Stages are prepare (CPU: corpus, tokenizer, token ids), base (the base model), distill (a memory of each run), evaluate
(all of them and the baselines) and report (results.jsonl, tables, figures). What has been done is not done again. Rows
are shared among processes, two on each GPU; one that fails does not stop the others.

`--recipe tiny` makes ahn-tiny, the model that ships with the package; its last stage, `card`, has to be named: it
writes the model card and copies everything into the package. `--smoke` is a shape that a CPU finishes in a minute.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.jobs import Job

STAGES = ("prepare", "base", "distill", "evaluate", "report")
"""What a command without stages does. Stages come in this order, however they are named."""
PER_GPU = 2
"""Processes: a model as small as these leaves a GPU idle while the host prepares the next kernel."""


def main(arguments: list[str] | None = None) -> None:
    began = time.perf_counter()
    options = parse(arguments)
    recipe, out, stages = options.recipe, options.out, options.stages or STAGES
    out.mkdir(parents=True, exist_ok=True)
    if "prepare" in stages:
        from stages.prepare import DONE, prepare

        if not (out / DONE).exists():
            prepare(recipe, out, options.corpus)
    failed = _work(options, _base(out), until=None) if "base" in stages else []
    if not failed and ("distill" in stages or "evaluate" in stages):
        until = None if options.until is None else 60 * options.until - (time.perf_counter() - began)
        failed = _work(options, _rows(options, stages), until)
    if "report" in stages:
        from stages.report import report

        report(recipe, out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if "card" in stages:
        from stages.card import install, write_card

        write_card(recipe, out)
        if not options.smoke:
            install(recipe, out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line to options; `recipe` is the recipe itself."""
    from stages.recipe import BASELINES
    from stages.recipes import RECIPES, smoke

    known = (*STAGES, "card")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (all), or card")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of this study")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="study")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to check the stages themselves")
    parser.add_argument("--corpus", type=Path, action="append", default=[], help="a folder of packages to read instead")
    parser.add_argument("--seconds", type=float, help="base: shorten training so that it ends by then")
    parser.add_argument("--device", help="cuda:0, cpu, ...; default: all visible GPUs, or the CPU")
    parser.add_argument("--jobs", type=_count, help="distill, evaluate: processes; default: 2 a GPU, 1 on a CPU")
    parser.add_argument("--until", type=float, metavar="MINUTES", help="distill, evaluate: begin no row after that")
    parser.add_argument("--only", type=_names, default=(), help="distill, evaluate: these rows only, a,b,...")
    parser.add_argument("--seeds", type=_numbers, default=(), help="distill, evaluate: these seeds only, 0,1,...")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(known)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if "card" in options.stages and options.recipe != "tiny":
        parser.error("the card is ahn-tiny's: name --recipe tiny")
    recipe = RECIPES[options.recipe]
    options.recipe = smoke(recipe) if options.smoke else recipe
    runs = {run.name for run in options.recipe.runs}
    missing = set(options.only) - runs - set(BASELINES)
    if missing:
        parser.error(f"the recipe has no run {', '.join(sorted(missing))}; it has {', '.join(sorted(runs))}")
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least one process is needed")
    return int(text)


def _work(options: argparse.Namespace, jobs: Sequence[Job], until: float | None) -> list[str]:
    """Do the jobs in as many processes as the options say; returns the names of those that failed."""
    if not jobs:
        return []
    import torch
    from stages.jobs import do
    from stages.work import Work

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = [options.device] if options.device else gpus or ["cpu"]
    count = options.jobs or sum(PER_GPU if device.startswith("cuda") else 1 for device in devices)
    places = [devices[number % len(devices)] for number in range(min(count, len(jobs)))]
    return do(jobs, functools.partial(Work, options.recipe, options.out, options.seconds), places, until)


def _base(out: Path) -> list[Job]:
    """The base model, if it is not there. In a process of its own, which gives its memory back."""
    from stages.base import DONE
    from stages.jobs import Job
    from stages.work import Part

    return [] if (out / DONE).exists() else [Job("base", Part(("base",)))]


def _rows(options: argparse.Namespace, stages: Sequence[str]) -> list[Job]:
    """What is missing of each row: its training, its evaluation, or both."""
    from stages.distill import marker
    from stages.evaluate import rows_file
    from stages.jobs import Job
    from stages.recipe import tasks, training
    from stages.work import Part

    chosen = tasks(options.recipe, options.only, options.seeds)
    untrained = [task.name for task in chosen if task.seed is not None and not marker(options.out, task).exists()]
    coming = untrained if "distill" in stages else []
    jobs: list[Job] = []
    for task in chosen:
        trained = training(task)
        parts = ["distill"] if task.name in coming else []
        needs = () if trained is None or trained.name == task.name or trained.name not in coming else (trained.name,)
        if "evaluate" in stages and not rows_file(options.out, task).exists():
            if trained is None or trained.name in coming or marker(options.out, trained).exists():
                parts.append("evaluate")
            else:
                print(f"{task.name}: {trained.name} is not trained yet, run `distill`", flush=True)
        if parts:
            jobs.append(Job(task.name, Part(tuple(parts), task), needs))
    return jobs


if __name__ == "__main__":
    main()
