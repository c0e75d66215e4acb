"""A study of a pretrained model: what there is to do, in which order, and how each part of it is done."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import calibrate_keys
import make_chats
import torch
import train_scores
from stages.jobs import Job
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ahn.checkpoint import shipped
from ahn.cli.env import environment
from ahn.files import write_text
from ahn.measure.texts import read_texts

from . import reading, tasks, training
from .ways import Way, Ways

STAGES = ("chats", "scores", "memories", "rows", "tasks", "far", "book")
CALIBRATED = 64
"""Chats from which the basis of keys is calibrated."""
WIDTH = 8192
"""Tokens of one number of a book's losses."""
MOST = 50
"""Texts read at the same time, at most."""
AT_ONCE = 1 << 18
"""Tokens of a forward. More leave no memory on a GPU for other processes, and hardly make it faster."""
AT_ONCE_APART = 1 << 16
"""The same where every head keeps tokens of its own, whose masks take more."""
LARGE = "large"
"""What takes a third of a GPU's memory: one after the other."""
Result: TypeAlias = dict[str, Any]
Part: TypeAlias = tuple[str, str]
"""A stage and a name: one line of rows.jsonl."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to do, of which a line is kept.

    Attributes:
        needs: what has to be done before.
        turn: as of `Job`.
    """

    stage: str
    name: str
    run: Callable[[], Result]
    needs: tuple[Part, ...] = ()
    turn: str | None = None

    @property
    def part(self) -> Part:
        return self.stage, self.name


class Study:
    """All that is to be done for some options.

    Args:
        device: of this process.
    """

    def __init__(self, options: argparse.Namespace, device: str = "cpu") -> None:
        self.options, self.out, self.device = options, options.out, device
        self.path = shipped.resolve(options.model)
        self.ways = Ways(
            options.window, options.sinks, options.length, self.scores, self.out / "shared", self.keys, self._adapters
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).to(self.device).eval()

    @property
    def scores(self) -> Path:
        return self.options.scores or self.out / "scores"

    @property
    def keys(self) -> Path:
        return self.options.keys or self.out / "keys"

    @property
    def _adapters(self) -> dict[str, Path]:
        """Where each recurrent memory is, or will be."""
        return {name: self.out / "memories" / name for name in self.options.memories.split(",") if name}

    @property
    def rows(self) -> list[Result]:
        file = self.out / "rows.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    # -- what there is to do --------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """What is not done, in order of importance, without what needs something that neither is there nor will be."""
        done = {(row["stage"], row["name"]) for row in self.rows if "error" not in row}
        missing = [item for item in self.items() if item.stage in self.options.only and item.part not in done]
        coming = {item.part for item in missing}
        return [
            Job(
                ": ".join(item.part),
                item.part,
                tuple(": ".join(part) for part in item.needs if part in coming),
                item.turn,
            )
            for item in missing
            if done | coming >= {*item.needs}
        ]

    def do(self, part: Part) -> None:
        """Do one of them and keep its line."""
        (item,) = (item for item in self.items() if item.part == part)
        began, row = time.perf_counter(), {"stage": item.stage, "name": item.name}
        try:
            row |= item.run()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise
        finally:
            row |= {"seconds": round(time.perf_counter() - began, 1), "model": self.options.model, **environment()}
            with (self.out / "rows.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()  # other processes want it

    def items(self) -> Iterator[Item]:
        """All of it, whatever was done."""
        o, train = self.options, (("chats", "train"),)
        yield from self._chats()
        if not o.scores:
            yield Item("scores", "scores of each head", lambda: self._learn(self.scores), train, LARGE)
        if not o.keys:
            yield Item("scores", "basis of keys", self._calibrate, train)
        yield Item("scores", "one score for all heads", lambda: self._learn(self.ways.shared, shared=True), train)
        for name in self._adapters:
            yield Item("memories", name, lambda name=name: self._distil(name), train, LARGE)
        for way in self.ways.within():
            yield self._item("rows", way, self._row, "one", "several")
        for spec in o.tasks:
            for way in self.ways.within():
                if way.main:
                    yield self._task(way, spec)
        for way in self.ways.beyond():
            yield self._item("far", way, self._far, "far")
        for way in self.ways.book():
            yield self._item("book", way, self._book)

    def _item(self, stage: str, way: Way, run: Callable[[Way], Result], *chats: str) -> Item:
        needs = (*self._needs(way), *(("chats", name) for name in chats))
        return Item(stage, way.name, lambda: self._read(way, run), needs)

    def _task(self, way: Way, spec: str) -> Item:
        def run(way: Way) -> Result:
            return {"way": way.name, "task": spec, "scores": self._scores(way, spec)}

        return Item("tasks", f"{spec}: {way.name}", lambda: self._read(way, run), self._needs(way))

    def _needs(self, way: Way) -> tuple[Part, ...]:
        """What makes the adapter of a way, unless it was brought along."""
        o = self.options
        made = {path: ("memories", name) for name, path in self._adapters.items()}
        made |= {self.ways.shared: ("scores", "one score for all heads")}
        made |= {} if o.scores else {self.scores: ("scores", "scores of each head")}
        made |= {} if o.keys else {self.keys: ("scores", "basis of keys")}
        return (made[way.adapter],) if way.adapter in made else ()

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

    def _write(self, name: str, plan: list[str]) -> Result:
        self._file(name).parent.mkdir(parents=True, exist_ok=True)
        make_chats.main(["--out", str(self._file(name)), "--model", self.path, *plan])
        return {"plan": plan}

    def _file(self, name: str) -> Path:
        return self.out / "chats" / f"{name}.jsonl"

    # -- what is learned ------------------------------------------------------------------------------------------

    def _learn(self, out: Path, shared: bool = False) -> Result:
        o = self.options
        return train_scores.trained(
            self.path, self._file("train"), out, o.score_chats, o.window, o.sinks, o.steps, seed=o.seed, shared=shared
        )

    def _calibrate(self) -> Result:
        o = self.options
        return calibrate_keys.calibrated(
            self.path, self._file("train"), self.keys, CALIBRATED, o.window, o.sinks, o.length - o.lossless
        )

    def _distil(self, name: str) -> Result:
        o = self.options
        texts = [reading.tokens_of(self.tokenizer, text) for text in o.texts.split(",")]
        chats = reading.read_chats(self.tokenizer, self._file("train"), o.train_chats)
        source = training.batches(texts, chats, o.length, o.batch, o.memory_steps, seed=0)
        (way,) = (way for way in self.ways.recurrent() if way.name == name)
        assert way.config and way.adapter
        return training.trained(self.model, way.config, source, o.memory_steps, o.memory_lr, way.adapter)

    # -- what is read ---------------------------------------------------------------------------------------------

    def _read(self, way: Way, run: Callable[[Way], Result]) -> Result:
        method = way.method(self.model)
        said = {} if method.config is None else {"config": dataclasses.asdict(method.config)}
        with method.on(self.model):
            return said | run(way)

    def _row(self, way: Way) -> Result:
        o, row = self.options, {}
        for kind, ids in self._texts.items():
            each, row["cache_bytes"] = reading.text_losses(self.model, ids, o.lossless, o.batch)
            row |= {f"{kind}_loss": sum(each) / len(each), f"{kind}_losses": [round(x, 5) for x in each]}
        for name in ("one", "several"):
            row |= self._found(way, name, o.chats, o.length)
        return row | {"length": o.length}

    def _found(self, way: Way, name: str, most: int, length: int) -> Result:
        chats = reading.read_chats(self.tokenizer, self._file(name), most)
        right, size = reading.recalled(self.model, chats, self._at_once(way, length, most))
        return {f"{name}_right": sum(right), f"{name}_asked": len(right), f"{name}_found": right, "cache_bytes": size}

    def _scores(self, way: Way, spec: str) -> dict[str, list[float]]:
        samples = self.options.task_samples
        evaluated = tasks.evaluated(self.model, self.tokenizer, self.path, way)
        batch = self._at_once(way, self.options.length, samples)
        found = tasks.scores(evaluated, spec, self.haystack, self.out / "tasks", samples, batch)
        return {name: [round(x, 4) for x in each] for name, each in found.items()}

    @cached_property
    def haystack(self) -> Path:
        """The book as a file: a default haystack hangs on the version of Python, and full attention's score on it."""
        file = self.out / "haystack.txt"
        if not file.exists():
            write_text(file, "\n\n".join(part.text for part in read_texts(self.options.book)))
        return file

    def _at_once(self, way: Way, length: int, count: int) -> int:
        """How many of `count` texts are read at the same time: of equal shares as large as memory allows."""
        config = self.model.ahn_config if way.config else None
        apart = config is not None and config.memory == "retained" and config.score_layer is None
        tokens = min(length, config.chunk) if config else length
        most = min(MOST, max(1, (AT_ONCE_APART if apart else AT_ONCE) // tokens))
        return -(-count // -(-count // most))

    def _far(self, way: Way) -> Result:
        o = self.options
        return self._found(way, "far", o.far_chats, o.far_length) | {"length": o.far_length}

    def _book(self, way: Way) -> Result:
        ids = self._book_ids[: self.options.book_tokens]
        afresh = way.config is None
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
