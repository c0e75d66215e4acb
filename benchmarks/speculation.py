"""Guessing tokens ahead: tokens per second with a prompt lookup and without, where texts repeat and where they do not.

    python benchmarks/speculation.py --out speculation.jsonl              # SmolLM2; a GPU if there is one, else the CPU
    python benchmarks/speculation.py --model DIR --adapter DIR --window 32640 --sinks 128
    python benchmarks/speculation.py --model qwen2.5-3b --window 32640 --sinks 128 --before 15000  # random weights

Three requests, each after a text that fills the window, so that tokens leave it all the while: a piece of code with a
name changed, a paragraph word for word, and a story. Greedy: the text with guesses must be the one without, and a row
says so. Tokens per second are of what comes after the first quarter of a text: graphs are recorded before.

The `forward` rows are milliseconds of one forward over n tokens that may be taken out again, beside a plain step (n is
0) and the base's forward over as many with a cache of full attention that holds as many tokens; the `turn` rows, of one
over n tokens that stay. On a GPU both ways are measured in the same run: by captured steps of several tokens, and as it
was without them (`captured`: false); a turn by a captured step for each of its tokens as well (`by_steps`).

On a CPU times are of the process, not of the clock on the wall: others on the machine then count for less; run it with
OMP_NUM_THREADS=1. Each row is a JSON line with versions and hardware. The table comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

import ahn
from ahn import decode, smollm2, tiny
from ahn.bench.model import load
from ahn.bench.records import code, hardware
from ahn.bench.shapes import SHAPES
from ahn.checkpoint.loading import ModelSource
from ahn.cli.env import environment
from ahn.decode import runner, several
from ahn.measure.clock import synchronize

QUOTE = (
    "The lighthouse keeper wrote down the weather four times a day, and the ships that passed, and what the gulls did. "
    "In forty years he filled ninety books. When the light was made to turn by itself, nobody asked for them, so he "
    "put them on a cart and took them to the school, where the children learned to read from storms."
)


def requests() -> dict[str, tuple[str, str]]:
    """What is asked for, and how the reply begins, by name."""
    source = inspect.getsource(statistics.quantiles)
    edit = f"```python\n{source}```\nRename the function `quantiles` to `cut_points`. Give the whole code."
    head, rest = source.split("quantiles", 1)
    return {
        "edit": (edit, f"```python\n{head}cut_points{rest[: rest.index(':') + 2]}"),
        "quote": (f"{QUOTE}\n\nRepeat the text above word for word.", ""),
        "story": ("Tell a story about a bridge that wanted to be a road.", ""),
    }


@contextlib.contextmanager
def captured(wanted: bool) -> Iterator[None]:
    """Inside the block several tokens at once are read by a captured step, or by an ordinary forward."""
    whole = decode.forward
    decode.forward = whole if wanted else runner.forward
    try:
        yield
    finally:
        decode.forward = whole


class Clock(BaseStreamer):
    """When tokens came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.now = clock
        self.came: list[tuple[int, float]] = []

    def put(self, value: Tensor) -> None:
        self.came.append((value.numel(), self.now()))

    def end(self) -> None:
        pass

    def tokens_per_second(self) -> float:
        """After the first quarter; what comes first is the prompt."""
        came, total = self.came[1:], sum(count for count, _ in self.came[1:])
        first, seen = came[0][1], 0
        for count, at in came:
            seen += count
            if seen >= total // 4:
                first = at
                break
        return (total - seen) / (came[-1][1] - first)


class Speculation:
    """One model, and a text before each request."""

    def __init__(self, options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.model, self.tokenizer = options, model, tokenizer
        self.read: tuple[ahn.AHNCache, DynamicCache] | None = None
        self.clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        self.ways = (False, True) if model.device.type == "cuda" else (False,)
        """Whether several tokens at once are captured."""

    def prompt(self, request: str, begin: str = "") -> Tensor:
        """(1, L) a conversation that was about something else, the request, and the reply's first words."""
        draw, words = random.Random(0), inspect.getsource(argparse).split()
        before = " ".join(draw.choice(words) for _ in range(self.options.before))
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"{before}\n\n{request}\n\n{begin}", return_tensors="pt")["input_ids"].to(
                self.model.device
            )
        said = [("user", f"Count these words: {before}"), ("assistant", "Many."), ("user", request)]
        messages = [{"role": role, "content": content} for role, content in said]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: Tensor = self.tokenizer(text + begin, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)

    @torch.no_grad()
    def write(self, ids: Tensor, cache: ahn.AHNCache, lookup: int) -> tuple[list[int], float, int, float]:
        """What is written after a prompt that was read, seconds, steps, and tokens per second."""
        clock = Clock(self.clock)
        guess: dict[str, Any] = {"prompt_lookup_num_tokens": lookup} if lookup else {}
        start = self.now()
        found = self.model.generate(
            ids, past_key_values=cache, max_new_tokens=self.options.tokens, do_sample=False, streamer=clock, **guess
        )
        new = found[0, ids.shape[1] :].tolist()
        seconds = self.now() - start
        return new, seconds, len(clock.came) - 1, clock.tokens_per_second()

    def now(self) -> float:
        """Seconds, when all that was begun is done."""
        synchronize(self.model.device)
        return self.clock()

    @torch.no_grad()
    def text(self, name: str, request: str, begin: str) -> list[dict[str, Any]]:
        """A row for each K, plain first; all begin at the same state, and take turns."""
        ids, read = self.prompt(request, begin), ahn.AHNCache.for_model(self.model)
        self.model(ids[:, :-1], past_key_values=read, logits_to_keep=1)
        ways = [(0, self.ways[-1]), *((k, way) for k in self.options.lookup for way in self.ways)]
        runs: dict[tuple[int, bool], list[tuple[list[int], float, int, float]]] = {way: [] for way in ways}
        for _ in range(self.options.repeats):
            for (k, way), own in runs.items():
                with captured(way):
                    own.append(self.write(ids, copy.deepcopy(read), k))
        plain, rows = statistics.median(speed for *_, speed in runs[ways[0]]), []
        for (k, way), own in runs.items():
            new, _, forwards, _ = own[0]
            speed, seconds = (statistics.median(run[n] for run in own) for n in (3, 1))
            row = {"text": name, "lookup": k, "captured": way, "prompt_tokens": ids.shape[1], "new_tokens": len(new)}
            row |= {"seconds": seconds, "all_seconds": [run[1] for run in own], "forwards": forwards}
            row |= {"tokens_per_second": speed, "all_tokens_per_second": [run[3] for run in own]}
            rows.append(row | {"times_plain": speed / plain, "same_text": new == runs[ways[0]][0][0]})
        return rows

    @torch.no_grad()
    def forward(self, length: int, way: bool) -> dict[str, Any]:
        """Milliseconds of a forward over so many tokens, all but the first taken out again; of a plain step for 0."""
        ids = self.prompt("x")
        self.read = self.read or self.caches(ids)
        cache, full = copy.deepcopy(self.read)
        if length:
            cache.activate_past_recording()
        with captured(way):
            milliseconds = self.timed(ids[:, : max(1, length)], cache, 1 - length if length else None)
        with ahn.disabled(self.model):
            of_base = self.timed(ids[:, : max(1, length)], full, -max(1, length))
        row = {"forward": length, "captured": way, "milliseconds": milliseconds, "base_milliseconds": of_base}
        return row | {"forwards": self.options.forwards}

    @torch.no_grad()
    def turn(self, length: int) -> dict[str, Any]:
        """Milliseconds of reading so many tokens for good: by captured steps of several, without them, one by one."""
        ids, row = self.prompt("x"), {"turn": length}
        self.read = self.read or self.caches(ids)
        for name, way in (("milliseconds", True), ("ordinary_milliseconds", False)):
            cache = copy.deepcopy(self.read[0])
            if way and not several.prepare(self.model, cache):
                return row
            with captured(way):
                row[name] = self.timed(ids[:, :length], cache, None)
        cache, times = copy.deepcopy(self.read[0]), []
        for _ in range(self.options.forwards + 3):
            start = self.now()
            for n in range(length):
                self.model(ids[:, n : n + 1], past_key_values=cache)
            times.append(self.now() - start)
        return row | {"by_steps_milliseconds": 1e3 * statistics.median(times[3:]), "forwards": self.options.forwards}

    @torch.no_grad()
    def caches(self, ids: Tensor) -> tuple[ahn.AHNCache, DynamicCache]:
        """That have read the prompt, and, with full attention, as many tokens as are held exactly."""
        cache, full = ahn.AHNCache.for_model(self.model), DynamicCache(config=self.model.config)
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        with ahn.disabled(self.model):
            self.model(ids[:, : self.model.ahn_config.lossless], past_key_values=full, logits_to_keep=1)
        return cache, full

    def timed(self, ids: Tensor, cache: Cache, crop: int | None) -> float:
        """Milliseconds of a forward, the median; after each a crop."""
        times = []
        for _ in range(self.options.forwards + 3):
            start = self.now()
            self.model(ids, past_key_values=cache, logits_to_keep=ids.shape[1])
            times.append(self.now() - start)
            if crop is not None:
                cache.crop(crop)
        return 1e3 * statistics.median(times[3:])


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, a line each."""
    lines = [f"{'text':8} {'K':>3} {'tokens/s':>9} {'x plain':>8} {'tokens a forward':>17}  same text"]
    for row in (row for row in rows if "text" in row):
        each = f"{row['new_tokens'] / row['forwards']:.2f}"
        same = ("yes" if row["same_text"] else "no") + ("  captured" if row["captured"] else "")
        speed, times = row["tokens_per_second"], row["times_plain"]
        lines.append(f"{row['text']:8} {row['lookup']:3} {speed:9.2f} {times:8.2f} {each:>17}  {same}")
    plain = next((row["milliseconds"] for row in rows if row.get("forward") == 0), None)
    for row in (row for row in rows if "forward" in row):
        name = f"forward of {row['forward']}" if row["forward"] else "plain step"
        times = f"{row['milliseconds'] / plain:5.2f} x a step"
        way = "  captured" if row["captured"] else ""
        lines.append(f"{name:14} {row['milliseconds']:8.2f} ms  {times}  base {row['base_milliseconds']:8.2f} ms{way}")
    for row in (row for row in rows if "milliseconds" in row and "turn" in row):
        others = f"ordinary {row['ordinary_milliseconds']:8.2f} ms  by steps {row['by_steps_milliseconds']:8.2f} ms"
        lines.append(f"turn of {row['turn']:<6} {row['milliseconds']:8.2f} ms  {others}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or Hub id, or a shape (default: SmolLM2)")
    parser.add_argument("--adapter", help="its memory (default: a new one, which reads nothing yet)")
    parser.add_argument("--memory", default="gated_deltanet", help="of a new one")
    parser.add_argument("--window", type=int, default=1504)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--quantized", type=int, default=0)
    parser.add_argument("--before", type=int, default=800, help="words before each request")
    parser.add_argument("--tokens", type=int, default=256, help="to write")
    parser.add_argument("--lookup", type=int, nargs="*", default=[5, 10], metavar="K", help="tokens guessed at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forwards", type=int, default=20, help="that are timed")
    parser.add_argument("--out", type=Path, help="append the rows to this file as well")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reach = {name: getattr(options, name) for name in ("window", "sinks", "quantized")}
    model, tokenizer = _loaded(options, reach, device)
    bench, rows = Speculation(options, model, tokenizer), list[dict[str, Any]]()
    shared = {"model": options.model or "smollm2", "memory": model.ahn_config.memory, **reach}
    shared |= {"dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    shared["clock"] = "process" if device.type == "cpu" else "wall"

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                print(json.dumps(row), file=file)

    write({"hardware": hardware(device), "environment": environment(), "code": code()})
    for length in (0, 1, 2, 5, 8, 9, 11):
        for way in bench.ways if length else bench.ways[-1:]:
            write(shared | bench.forward(length, way))
    for length in (8, 17, 32, 64) if device.type == "cuda" else ():
        write(shared | bench.turn(length))
    for name, request in requests().items():
        for row in bench.text(name, *request):
            write(shared | row)
    print(table(rows))


def _loaded(
    options: argparse.Namespace, reach: dict[str, int], device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if options.model in SHAPES:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        base, words = load(options.model, True, device, dtype).model, AutoTokenizer.from_pretrained(tiny.path())
        return ahn.attach(base, ahn.AHNConfig(memory=options.memory, **reach)).to(dtype), words
    path = options.model or str(smollm2.path())
    if options.adapter:
        return ModelSource.open(path, options.adapter, **reach).load_ready(str(device), None)
    model, tokenizer = ModelSource.open(path).load_ready(str(device), None, memory=False)
    return ahn.attach(model, ahn.AHNConfig(memory=options.memory, **reach)), tokenizer


if __name__ == "__main__":
    main()
