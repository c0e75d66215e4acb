"""Guessing tokens ahead: tokens per second with a prompt lookup and without, where texts repeat and where they do not.

    python benchmarks/speculation.py --out speculation.jsonl              # SmolLM2; a GPU if there is one, else the CPU
    python benchmarks/speculation.py --model DIR --adapter DIR --window 32640 --sinks 128

Three requests, each after a text that fills the window, so that tokens leave it all the while: a piece of code with a
name changed, a paragraph word for word, and a story. Greedy: the text with guesses must be the one without, and a row
says so. The `forward` rows are milliseconds of one forward over n tokens that may be taken out again, beside a plain
step (n = 0) and the base's forward over as many with a cache of full attention that holds as many tokens.

On a CPU times are of the process, not of the clock on the wall: others on the machine then count for less; run it with
OMP_NUM_THREADS=1. Each row is a JSON line with versions and hardware. The table comes last.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import ahn
from ahn import smollm2
from ahn.bench.records import code, hardware
from ahn.checkpoint.loading import ModelSource
from ahn.cli.env import environment
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


class Speculation:
    """One model, and a text before each request."""

    def __init__(self, options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.model, self.tokenizer = options, model, tokenizer
        self.read: tuple[ahn.AHNCache, DynamicCache] | None = None

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
    def write(self, ids: Tensor, cache: ahn.AHNCache, lookup: int) -> tuple[list[int], float, int]:
        """What is written after a prompt that was read, seconds, and forwards."""
        counted: list[int] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda *_: counted.append(1))
        guess: dict[str, Any] = {"prompt_lookup_num_tokens": lookup} if lookup else {}
        start = self.now()
        found = self.model.generate(
            ids, past_key_values=cache, max_new_tokens=self.options.tokens, do_sample=False, **guess
        )
        new = found[0, ids.shape[1] :].tolist()
        seconds = self.now() - start
        handle.remove()
        return new, seconds, len(counted)

    def now(self) -> float:
        """Seconds, when all that was begun is done."""
        synchronize(self.model.device)
        return time.process_time() if self.model.device.type == "cpu" else time.perf_counter()

    @torch.no_grad()
    def text(self, name: str, request: str, begin: str) -> list[dict[str, Any]]:
        """A row for each K, plain first; all begin at the same state, and take turns."""
        ids, read = self.prompt(request, begin), ahn.AHNCache.for_model(self.model)
        self.model(ids[:, :-1], past_key_values=read, logits_to_keep=1)
        runs: dict[int, list[tuple[list[int], float, int]]] = {k: [] for k in (0, *self.options.lookup)}
        for _ in range(self.options.repeats):
            for k, own in runs.items():
                own.append(self.write(ids, copy.deepcopy(read), k))
        plain, rows = statistics.median(seconds for _, seconds, _ in runs[0]), []
        for k, own in runs.items():
            new, _, forwards = own[0]
            seconds = statistics.median(seconds for _, seconds, _ in own)
            row = {"text": name, "lookup": k, "prompt_tokens": ids.shape[1], "new_tokens": len(new)}
            row |= {"seconds": seconds, "all_seconds": [one for _, one, _ in own], "forwards": forwards or None}
            row |= {"tokens_per_second": len(new) / seconds, "times_plain": plain / seconds}
            rows.append(row | {"same_text": new == runs[0][0][0]})
        return rows

    @torch.no_grad()
    def forward(self, length: int) -> dict[str, Any]:
        """Milliseconds of a forward over so many tokens, all but the first taken out again; of a plain step for 0."""
        ids = self.prompt("x")
        self.read = self.read or self.caches(ids)
        cache, full = copy.deepcopy(self.read)
        if length:
            cache.activate_past_recording()
        milliseconds = self.timed(ids[:, : max(1, length)], cache, 1 - length if length else None)
        with ahn.disabled(self.model):
            of_base = self.timed(ids[:, : max(1, length)], full, -max(1, length))
        row = {"forward": length, "milliseconds": milliseconds, "base_milliseconds": of_base}
        return row | {"forwards": self.options.forwards}

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
        each = f"{row['new_tokens'] / row['forwards']:.2f}" if row["forwards"] else ""
        same = "yes" if row["same_text"] else "no"
        speed, times = row["tokens_per_second"], row["times_plain"]
        lines.append(f"{row['text']:8} {row['lookup']:3} {speed:9.2f} {times:8.2f} {each:>17}  {same}")
    plain = next((row["milliseconds"] for row in rows if row.get("forward") == 0), None)
    for row in (row for row in rows if "forward" in row):
        name = f"forward of {row['forward']}" if row["forward"] else "plain step"
        times = f"{row['milliseconds'] / plain:5.2f} x a step"
        lines.append(f"{name:14} {row['milliseconds']:8.2f} ms  {times}  base {row['base_milliseconds']:8.2f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or Hub id (default: SmolLM2)")
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
    for length in (0, 1, 2, 5, 9, 11):
        write(shared | bench.forward(length))
    for name, request in requests().items():
        for row in bench.text(name, *request):
            write(shared | row)
    print(table(rows))


def _loaded(
    options: argparse.Namespace, reach: dict[str, int], device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = options.model or str(smollm2.path())
    if options.adapter:
        return ModelSource.open(path, options.adapter, **reach).load_ready(str(device), None)
    model, tokenizer = ModelSource.open(path).load_ready(str(device), None, memory=False)
    return ahn.attach(model, ahn.AHNConfig(memory=options.memory, **reach)), tokenizer


if __name__ == "__main__":
    main()
