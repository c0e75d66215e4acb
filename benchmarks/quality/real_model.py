"""What remains of a long text on a pretrained instruct model: one study, one command.

    python benchmarks/quality/real_model.py --out runs/smollm2
    python benchmarks/quality/real_model.py --out runs/smollm2 --only chats         # needs no GPU

Stages: `chats` writes conversations to learn from and to be asked; `scores` trains the scores of retained tokens, and
calibrates the basis in which keys are coded; `memories` distils recurrent memories; `rows` reads texts and asks facts
within the trained length, in every way of `real/ways.py`; `tasks` answers tasks of `ahn eval` in the main ways; `far`
asks facts beyond the trained length; `book` gives the loss of a whole book by position.

Several processes share what there is to do, five on each GPU: whichever is free takes the next thing. What is done is
a line in rows.jsonl and is not done again. A thing that fails does not stop the others; the command then ends with an
error that names it. A table is printed last, and report/ compares the tasks as `ahn eval report` does.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from real.study import STAGES, Part, Study
from real.table import table
from stages.jobs import do

from ahn.errors import AHNError
from ahn.evaluation.report import write_report
from ahn.evaluation.tasks import check

PER_GPU = 5
"""Processes: a model as small as these leaves a GPU idle while the host prepares the next kernel."""


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options)
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    count = options.jobs or PER_GPU * len(gpus) or 1
    devices = [(gpus or ["cpu"])[number % max(1, len(gpus))] for number in range(count)]
    failed = do(study.jobs(), functools.partial(worker, options), devices, options.seconds)
    if any(row["stage"] == "tasks" and "error" not in row for row in study.rows):
        write_report([options.out / "tasks"], options.out / "report")
    print(table(study.rows))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if left := study.jobs():
        sys.exit(f"not begun: {', '.join(job.name for job in left)}. The same command goes on.")


def worker(options: argparse.Namespace, device: str) -> Callable[[Part], None]:
    """What a process does, one thing after the other."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return Study(options, device).do


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    networkx = importlib.util.find_spec("networkx")  # torch needs it; no training of ours reads it
    code = str(Path(networkx.origin).parent) if networkx and networkx.origin else "stdlib"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--jobs", type=int, help="processes (default: five a GPU, one on a CPU)")
    parser.add_argument("--seconds", type=float, help="begin nothing after so many")
    parser.add_argument("--only", default=",".join(STAGES), help="stages; commas between")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text or chat within the trained length")
    parser.add_argument("--count", type=int, default=32, help="texts of each kind")
    parser.add_argument("--batch", type=int, default=8, help="texts read, or learned from, at once")
    parser.add_argument("--chats", type=int, default=100, help="of each task")
    parser.add_argument("--far-length", type=int, default=65536)
    parser.add_argument("--far-chats", type=int, default=100)
    parser.add_argument("--train-chats", type=int, default=800, help="that memories learn from")
    parser.add_argument("--score-chats", type=int, default=128, help="the first of them, that scores learn from")
    parser.add_argument("--steps", type=int, default=1000, help="of the training of scores")
    parser.add_argument("--seed", type=int, default=0, help="of the training of scores")
    parser.add_argument("--memories", default="deltanet,gated_deltanet,mamba2,routed_deltanet", help="commas between")
    parser.add_argument("--memory-steps", type=int, default=200, help="of their training, of --batch texts each")
    parser.add_argument("--memory-lr", type=float, default=2e-3)
    tasks = "ruler/4k,recall/changes/8k,ruler/8k"
    parser.add_argument("--tasks", default=tasks, help="of `ahn eval`, in the main ways; commas between")
    parser.add_argument("--task-samples", type=int, default=100, help="of each task")
    parser.add_argument("--texts", default="sotu,stdlib", help="of the chats; as make_chats.py")
    parser.add_argument("--book", default="moby-dick", help="prose, and the book that is read whole")
    parser.add_argument("--book-tokens", type=int, default=300_000, help="at most")
    parser.add_argument("--code", default=code, help="a folder of sources")
    parser.add_argument("--scores", type=Path, help="an adapter with the scores of each head that is there already")
    parser.add_argument("--keys", type=Path, help="an adapter with the basis of keys that is there already")
    options = parser.parse_args(arguments)
    for name in ("only", "tasks"):
        setattr(options, name, [part for part in getattr(options, name).split(",") if part])
    if wrong := set(options.only) - set(STAGES):
        parser.error(f"there is no stage {', '.join(wrong)}; there are {', '.join(STAGES)}")
    try:
        for spec in options.tasks:
            check(spec)
    except AHNError as error:
        parser.error(str(error))
    options.lossless = options.window + options.sinks
    return options


if __name__ == "__main__":
    main()
