"""What remains of a long text on a pretrained instruct model: one study, in calls of a few minutes each.

    python benchmarks/quality/real_model.py --out runs/smollm2 --seconds 520        # again, until nothing is left
    python benchmarks/quality/real_model.py --out runs/smollm2 --only chats         # needs no GPU

Stages, in this order: `chats` writes conversations to learn from and to be asked; `scores` trains the scores of
retained tokens, and calibrates the basis in which keys are coded; `memories` distils recurrent memories; `rows` reads
texts and asks facts within the trained length, in every way of `real/ways.py`; `ruler` answers RULER's tasks; `far`
asks facts beyond the trained length; `book` gives the loss of a whole book by position. What is done is a line in
rows.jsonl and is not done again; nothing is begun that would probably not end within `--seconds`. Once chats and
scores are there, several processes share the rest with `--part 1/4`, `--part 2/4`, … The table is printed last.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import calibrate_keys
import make_chats
import torch
import train_scores
from real import reading, ruler, training
from real.ways import FULL, WINDOW, Shape, Ways
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ahn.checkpoint import shipped
from ahn.cli.env import environment
from ahn.measure.intervals import wilson
from ahn.measure.method import Method

STAGES = ("chats", "scores", "memories", "rows", "ruler", "far", "book")
NEEDED = ("chats", "scores")
"""Without which the others cannot do."""
CALIBRATED = 64
"""Chats from which the basis of keys is calibrated."""
WIDTH = 8192
"""Tokens of one number of a book's losses."""
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to do, of which a line is kept."""

    stage: str
    name: str
    run: Callable[[], Result]


class Study:
    """All that is to be done for some options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.path = shipped.resolve(options.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        (self.out / "chats").mkdir(parents=True, exist_ok=True)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).to(self.device).eval()

    @cached_property
    def ways(self) -> Ways:
        o = self.options
        shape = Shape(o.window, o.sinks, o.length, self.scores, self._adapters, self.shared_scores, self.keys)
        return Ways(shape, self.model)

    @property
    def scores(self) -> Path:
        return self.options.adapter or self.out / "scores"

    @property
    def keys(self) -> Path:
        return self.options.keys or self.out / "keys"

    @property
    def shared_scores(self) -> Path | None:
        layer = self.options.score_layer
        return None if layer is None else self.out / f"scores-of-layer-{layer}"

    @property
    def rows(self) -> list[Result]:
        file = self.out / "rows.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def items(self) -> Iterator[Item]:
        """In order of importance; what a later one needs comes before it."""
        if "chats" in self.options.only:
            yield from self._chats()
        if "scores" in self.options.only and not self.options.adapter:
            heads = self.options.heads
            yield Item("scores", "scores of retained tokens", lambda: self._learn(self.scores, heads=heads))
        if "scores" in self.options.only and not self.options.keys:
            yield Item("scores", "basis of keys", self._calibrate)
        if "scores" in self.options.only and (path := self.shared_scores):
            layer = self.options.score_layer
            yield Item("scores", f"scores of layer {layer}", lambda: self._learn(path, score_layer=layer))
        if "memories" in self.options.only:
            for name in self._adapters:
                yield Item("memories", name, lambda name=name: self._distil(name))
        for stage, ways, run in (
            ("rows", Ways.within, self._row),
            ("ruler", Ways.within, self._ruler),
            ("far", Ways.beyond, self._far),
            ("book", Ways.book, self._book),
        ):
            if stage in self.options.only:
                for method in ways(self.ways):
                    yield Item(stage, method.name, lambda method=method, run=run: self._read(method, run))

    # -- chats ----------------------------------------------------------------------------------------------------

    def _chats(self) -> Iterator[Item]:
        o = self.options
        evaluation = ["--split", "evaluation", "--texts", o.texts]
        one = ["--kinds", "number", "--most", "1", "--near", str(o.length // 8)]
        several = ["--kinds", "number,word,change", "--most", "8", "--near", str(o.lossless + 200)]
        far = ["--kinds", "number", "--most", "1", "--near", str(o.far_length - o.far_length // 8)]
        plans = {
            "train": ["--texts", o.texts, "--count", str(o.train_chats), "--length", str(o.length)],
            "one": [*evaluation, *one, "--count", str(o.chats), "--length", str(o.length)],
            "several": [*evaluation, *several, "--count", str(o.chats), "--length", str(o.length)],
            "far": [*evaluation, *far, "--count", str(o.far_chats), "--length", str(o.far_length)],
        }
        for name, plan in plans.items():
            yield Item("chats", name, lambda name=name, plan=plan: self._write(name, plan))
        if "ruler" in o.only:
            yield Item("chats", "ruler", self._write_ruler)

    def _write_ruler(self) -> Result:
        o = self.options
        return ruler.write_prompts(self.tokenizer, self._file("ruler"), o.ruler_length, o.ruler_samples)

    def _write(self, name: str, plan: list[str]) -> Result:
        make_chats.main(["--out", str(self._file(name)), "--model", self.path, *plan])
        return {"plan": plan}

    def _file(self, name: str) -> Path:
        return self.out / "chats" / f"{name}.jsonl"

    # -- scores ---------------------------------------------------------------------------------------------------

    def _learn(self, out: Path, **scorers: int | None) -> Result:
        o = self.options
        return train_scores.trained(
            self.path, self._file("train"), out, o.train_chats, o.window, o.sinks, o.steps, seed=o.seed, **scorers
        )

    def _calibrate(self) -> Result:
        o = self.options
        return calibrate_keys.calibrated(
            self.path, self._file("train"), self.keys, CALIBRATED, o.window, o.sinks, o.length - o.lossless
        )

    # -- memories -------------------------------------------------------------------------------------------------

    @property
    def _adapters(self) -> dict[str, Path]:
        """Where each recurrent memory is, or will be."""
        return {name: self.out / "memories" / name for name in self.options.memories.split(",") if name}

    def _distil(self, name: str) -> Result:
        o = self.options
        texts = [reading.tokens_of(self.tokenizer, text) for text in o.texts.split(",")]
        chats = reading.read_chats(self.tokenizer, self._file("train"), o.train_chats)
        source = training.batches(texts, chats, o.length, o.batch, o.memory_steps, seed=0)
        config = self.ways.config(name)
        return training.trained(self.model, config, source, o.memory_steps, o.memory_lr, self._adapters[name])

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self, method: Method, run: Callable[[Method], Result]) -> Result:
        config = method.config
        said = {} if config is None else {"config": dataclasses.asdict(config)}
        with method.on(self.model):
            return said | run(method)

    def _row(self, method: Method) -> Result:
        o, row = self.options, {}
        for kind, ids in self._texts.items():
            each, row["cache_bytes"] = reading.text_losses(self.model, ids, o.lossless, o.batch)
            row |= {f"{kind}_loss": sum(each) / len(each), f"{kind}_losses": [round(x, 5) for x in each]}
        for name in ("one", "several"):
            row |= self._found(method, name, o.chats)
        return row | {"length": o.length}

    def _found(self, method: Method, name: str, most: int) -> Result:
        # Where one score is for all layers a text is read in chunks of a window: one chat alone leaves a GPU waiting.
        batch = self.options.batch if method.config and method.config.score_layer is not None else 1
        right, size = reading.recalled(self.model, reading.read_chats(self.tokenizer, self._file(name), most), batch)
        return {f"{name}_right": sum(right), f"{name}_asked": len(right), f"{name}_found": right, "cache_bytes": size}

    def _ruler(self, method: Method) -> Result:
        scores = ruler.scores(self.model, self.tokenizer, self._file("ruler"), self.options.ruler_samples)
        return {"ruler": scores, "length": self.options.ruler_length}

    def _far(self, method: Method) -> Result:
        return self._found(method, "far", self.options.far_chats) | {"length": self.options.far_length}

    def _book(self, method: Method) -> Result:
        ids = self._book_ids[: self.options.book_tokens]
        afresh = method.config is None
        each, size = reading.by_position(self.model, ids, min(WIDTH, len(ids)), afresh)
        return {"book_losses": each, "width": WIDTH, "afresh": afresh, "length": len(ids), "cache_bytes": size}

    @cached_property
    def _book_ids(self) -> torch.Tensor:
        return reading.tokens_of(self.tokenizer, self.options.book)

    @cached_property
    def _texts(self) -> dict[str, torch.Tensor]:
        o = self.options
        code = reading.tokens_of(self.tokenizer, o.code)
        return {name: reading.pieces(x, o.length, o.count) for name, x in (("prose", self._book_ids), ("code", code))}


def run(study: Study, seconds: float) -> bool:
    """Do what is not done and fits; whether nothing is left, and nothing failed."""
    began, longest, whole = time.perf_counter(), {}, True
    done = {(row["stage"], row["name"]) for row in study.rows if "error" not in row}
    for number, item in enumerate(study.items()):
        if number % study.options.parts != study.options.part or (item.stage, item.name) in done:
            continue
        spent = time.perf_counter() - began
        if spent + longest.get(item.stage, 0.0) > seconds:
            print(f"No time for {item.stage}: {item.name}; call again.", flush=True)
            return False
        row: Result = {"stage": item.stage, "name": item.name}
        try:
            row |= item.run()
        except Exception as error:  # the others are worth their time
            traceback.print_exc()
            row["error"], whole = f"{type(error).__name__}: {error}".partition("\n")[0], False
        row["seconds"] = round(time.perf_counter() - began - spent, 1)
        longest[item.stage] = max(longest.get(item.stage, 0.0), row["seconds"])
        with (study.out / "rows.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(row | {"model": study.options.model, **environment()}) + "\n")
        print(f"{item.stage:7s} {item.name:40s} {row['seconds']:7.1f} s  {row.get('error', '')}", flush=True)
        if "error" in row and item.stage in NEEDED:
            return False
    return whole


def table(rows: list[Result]) -> str:
    """What there is to see of the rows, the latest of each name."""
    latest = {(row["stage"], row["name"]): row for row in rows if "error" not in row}
    full, window = (latest.get(("rows", name)) for name in (FULL, WINDOW))
    lines = []
    for (stage, name), row in latest.items():
        parts = [f"{stage:7s}", f"{name:40s}", f"{row.get('cache_bytes', 0) / 2**20:7.1f} MiB"]
        for kind in ("prose", "code"):
            if f"{kind}_loss" in row:
                parts.append(f"{kind} {row[f'{kind}_loss']:.3f}{_won(row, full, window, f'{kind}_loss')}")
        parts += [_share(row, kind) for kind in ("one", "several", "far") if f"{kind}_asked" in row]
        if "ruler" in row:
            each = {name.split("/")[1]: 100 * sum(x) / len(x) for name, x in row["ruler"].items()}
            parts.append(f"RULER {sum(each.values()) / len(each):.1f} %")
            parts += [f"{name} {score:.0f}" for name, score in each.items()]
        if "book_losses" in row:
            parts.append("loss by position " + " ".join(f"{x:.2f}" for x in row["book_losses"]))
        if "recall" in row:
            parts.append(f"{row['steps']} steps, recall {row['recall']:.3f}")
        lines.append("  ".join((*parts, f"{row['seconds']} s")))
    return "\n".join(lines)


def _won(row: Result, full: Result | None, window: Result | None, name: str) -> str:
    if not (full and window) or full[name] == window[name]:
        return ""
    return f" ({100 * (window[name] - row[name]) / (window[name] - full[name]):.0f} %)"


def _share(row: Result, kind: str) -> str:
    right, total = row[f"{kind}_right"], row[f"{kind}_asked"]
    low, high = wilson(right, total)
    return f"{kind} {100 * right / total:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    networkx = importlib.util.find_spec("networkx")  # torch needs it; no training of ours reads it
    code = str(Path(networkx.origin).parent) if networkx and networkx.origin else "stdlib"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=520, help="begin nothing that would end later")
    parser.add_argument("--only", default=",".join(STAGES), help="stages; commas between")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text or chat within the trained length")
    parser.add_argument("--count", type=int, default=32, help="texts of each kind")
    parser.add_argument("--batch", type=int, default=8, help="texts read at once")
    parser.add_argument("--chats", type=int, default=100, help="of each task")
    parser.add_argument("--far-length", type=int, default=65536)
    parser.add_argument("--far-chats", type=int, default=40)
    parser.add_argument("--train-chats", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000, help="of the training of scores")
    parser.add_argument("--ruler-length", type=int, default=4096, help="tokens of prompt and answer")
    parser.add_argument("--ruler-samples", type=int, default=100, help="of each task")
    parser.add_argument("--part", default="1/1", help="only each n-th thing to do, beginning with the k-th: k/n")
    parser.add_argument("--heads", type=int, help="key heads that keep tokens (default: all)")
    parser.add_argument("--score-layer", type=int, help="also with scores of this layer for all heads")
    parser.add_argument("--seed", type=int, default=0, help="of the training of scores")
    parser.add_argument("--memories", default="deltanet,gated_deltanet,mamba2,routed_deltanet", help="commas between")
    parser.add_argument("--memory-steps", type=int, default=200, help="of their training, of --batch texts each")
    parser.add_argument("--memory-lr", type=float, default=2e-3)
    parser.add_argument("--texts", default="sotu,stdlib", help="of the chats; as make_chats.py")
    parser.add_argument("--book", default="moby-dick", help="prose, and the book that is read whole")
    parser.add_argument("--book-tokens", type=int, default=300_000, help="at most")
    parser.add_argument("--code", default=code, help="a folder of sources")
    parser.add_argument("--adapter", type=Path, help="scores of retained tokens that are there already")
    parser.add_argument("--keys", type=Path, help="an adapter with the basis of keys that is there already")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if not (part := re.fullmatch(r"(\d+)/(\d+)", options.part)) or not 0 < int(part[1]) <= int(part[2]):
        parser.error("--part is k/n, 1 ≤ k ≤ n")
    options.part, options.parts = int(part[1]) - 1, int(part[2])
    if wrong := set(options.only) - set(STAGES):
        parser.error(f"there is no stage {', '.join(wrong)}; there are {', '.join(STAGES)}")
    options.lossless = options.window + options.sinks
    return options


def main(arguments: list[str] | None = None) -> int:
    study = Study(parsed(arguments))
    whole = run(study, study.options.seconds)
    print(table(study.rows))
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
