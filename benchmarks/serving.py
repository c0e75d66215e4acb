"""The engine of `ahn serve`: what scheduling costs, when the first token comes, and the pace while others read.

    python benchmarks/serving.py --model qwen2.5-3b --window 32640 --sinks 128 --context 131072 --conversations 100 \\
        --state-dir /fast/disk --out serving.jsonl          # a GPU
    python benchmarks/serving.py                            # a CPU, minutes: the model that ships, short texts

Weights of shapes are random, the memory is new: what it says is not looked at. Three questions, a JSON line each, after
one with machine and versions:

- `throughput`: tokens per second of N conversations that each have read a text, beside steps of the same batch with
  nothing around them;
- `second_turn`: seconds from a request that goes on from the text to its first token: the state in memory, on disk, and
  not kept;
- `pace`: seconds between a reply's tokens while others' texts of the same length are read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import ahn
from ahn import tiny
from ahn.bench.model import load
from ahn.bench.records import code, hardware
from ahn.cli.env import environment
from ahn.measure.clock import synchronize
from ahn.serve.engine.batch import make_batch
from ahn.serve.engine.engine import Engine
from ahn.serve.engine.reply import Reply
from ahn.serve.request import GenerationRequest, SamplingOptions

GIB = 1 << 30


class AnyTokens:
    """The shipped tokenizer, for ids of any vocabulary: decoding takes the time that it takes."""

    eos_token_id = None

    def __init__(self) -> None:
        self._own = AutoTokenizer.from_pretrained(tiny.path())

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        text: str = self._own.decode([token % len(self._own) for token in ids], **options)
        return text


class Bench:
    """One model and its numbers."""

    def __init__(self, options: argparse.Namespace, model: PreTrainedModel) -> None:
        self.options, self.model = options, model
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.text = self.tokens(options.context, seed=0)

    def tokens(self, length: int, seed: int) -> list[int]:
        """Random ids."""
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(self.vocabulary, (length,), generator=generator).tolist()
        return ids

    def engine(self, folder: Path | None, state_bytes: int = 64 * GIB) -> Engine:
        """A started one."""
        rows, held = self.options.conversations, self.options.device_bytes
        made = Engine(
            self.model,
            AnyTokens(),  # type: ignore[arg-type]
            conversations=rows,
            state_dir=folder,
            state_bytes=state_bytes,
            device_bytes=held,
            queue=4 * rows,
            max_prompt=1 << 24,
        )
        made.start()
        return made

    def submit(self, engine: Engine, ids: Sequence[int], count: int, keep: bool = True) -> Reply:
        """A greedy reply of that many tokens."""
        return engine.submit(
            GenerationRequest(ids, SamplingOptions(count, temperature=0.0, ignore_eos=True), keep=keep)
        )

    def throughput(self) -> dict[str, Any]:
        """Of all conversations at once, between the first token of the last and the last token of the first."""
        rows, count = self.options.conversations, self.options.tokens
        engine = self.engine(None)
        drain(self.submit(engine, self.text, 0))
        replies = [self.submit(engine, [*self.text, *self.tokens(4, n + 1)], count, keep=False) for n in range(rows)]
        times = all_times(replies)
        engine.close()
        start, stop = max(own[0] for own in times), min(own[-1] for own in times)
        tokens = sum(start < at <= stop for own in times for at in own)
        found = {"tokens_per_second": tokens / (stop - start), "tokens_measured": tokens}
        return found | {"batch_tokens_per_second": self.batch_rate()}

    @torch.no_grad()
    def batch_rate(self) -> float:
        """Tokens per second of steps alone."""
        rows, steps = self.options.conversations, max(8, self.options.tokens // 2)
        cache = ahn.AHNCache.for_model(self.model)
        self.model(torch.tensor([self.text], device=self.model.device), past_key_values=cache, logits_to_keep=1)
        batch = make_batch(self.model, rows, cache)
        for _ in range(rows):
            batch.add(cache)
        tokens = [1] * rows
        for _ in range(4):
            batch.step(tokens)
        synchronize(self.model.device)
        start = time.perf_counter()
        for _ in range(steps):
            batch.step(tokens).argmax(-1).tolist()
        return rows * steps / (time.perf_counter() - start)

    def second_turn(self, folder: Path) -> dict[str, Any]:
        """Seconds to the first token."""
        found: dict[str, Any] = {}
        for place, state_bytes in (("memory", 64 * GIB), ("disk", 1)):
            engine = self.engine(folder, state_bytes)
            reply = list(self.submit(engine, self.text, 4))
            said = [token for delta in reply for token in delta.tokens]
            times = []
            for turn in range(self.options.repeats):
                if place == "disk":
                    drain(self.submit(engine, self.tokens(64, 100 + turn), 1))  # takes its place in memory
                    wait_for(lambda: engine.stats().in_memory <= 1)  # noqa: B023
                times.append(self.first(engine, [*self.text, *said, *self.tokens(16, 200 + turn)]))
            found |= {f"{place}_s": statistics.median(times), f"{place}_times_s": times}
            engine.close()
        engine = self.engine(None)
        found["not_kept_s"] = self.first(engine, self.tokens(self.options.context + 16, 999))
        engine.close()
        return found

    def first(self, engine: Engine, ids: Sequence[int]) -> float:
        """Seconds to the first token of a reply that is not kept."""
        start = time.perf_counter()
        reply = self.submit(engine, ids, 2, keep=False)
        for delta in reply:
            if delta.tokens:
                break
        seconds = time.perf_counter() - start
        drain(reply)
        return seconds

    def pace(self) -> dict[str, Any]:
        """Between two tokens of one reply, alone and while texts are read one after the other."""
        engine = self.engine(None)
        count = 4 * self.options.tokens
        alone = gaps(all_times([self.submit(engine, self.tokens(64, 1), count)])[0])
        writer = self.submit(engine, self.tokens(64, 2), 1 << 20)
        stop = threading.Event()

        def read() -> None:
            seed = 1000
            while not stop.is_set():
                drain(self.submit(engine, self.tokens(self.options.context, seed := seed + 1), 1, keep=False))

        thread = threading.Thread(target=read)
        thread.start()
        found: list[float] = []
        for delta in writer:
            found += [time.perf_counter()] * len(delta.tokens)
            if len(found) >= count:
                writer.cancel()
        stop.set()
        thread.join()
        engine.close()
        return {"alone": shares(alone), "while_others_read": shares(gaps(found))}


def drain(reply: Reply) -> None:
    """Read a reply to its end."""
    for delta in reply:
        assert delta.finish != "error", delta.error


def all_times(replies: Sequence[Reply]) -> list[list[float]]:
    """When each reply's tokens came."""
    times: list[list[float]] = [[] for _ in replies]

    def read(reply: Reply, own: list[float]) -> None:
        for delta in reply:
            own += [time.perf_counter()] * len(delta.tokens)

    threads = [threading.Thread(target=read, args=pair) for pair in zip(replies, times, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def gaps(times: Sequence[float]) -> list[float]:
    """Between one token and the next."""
    return [after - before for before, after in itertools.pairwise(times)]


def shares(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median_s": statistics.median(ordered), "p99_s": p99, "largest_s": ordered[-1], "count": len(ordered)}


def wait_for(done: Callable[[], bool]) -> None:
    """At most a minute."""
    until = time.monotonic() + 60
    while not done() and time.monotonic() < until:
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a shape's name, a directory or Hub id, as of ahn bench")
    parser.add_argument("--memory", default="gated_deltanet")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--quantized", type=int, default=0)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a reply")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device-bytes", type=int, default=16 * GIB, help="of idle states on a GPU")
    parser.add_argument("--state-dir", type=Path, help="on the disk that is measured")
    parser.add_argument("--only", nargs="*", choices=["throughput", "second_turn", "pace"])
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(options.model, False, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = {name: getattr(options, name) for name in ("memory", "window", "sinks", "quantized")}
    bench = Bench(options, ahn.attach(loaded.model, ahn.AHNConfig(**config)))

    def write(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                print(json.dumps(row), file=file)

    write({"hardware": hardware(device), "environment": environment(), "code": code()})
    shared = {"model": loaded.name, **config, "context": options.context, "conversations": options.conversations}
    with tempfile.TemporaryDirectory(dir=options.state_dir) as folder:
        questions: dict[str, Callable[[], dict[str, Any]]] = {
            "throughput": bench.throughput,
            "second_turn": lambda: bench.second_turn(Path(folder)),
            "pace": bench.pace,
        }
        for name in options.only or questions:
            write({"question": name, **shared, **questions[name]()})


if __name__ == "__main__":
    main()
