"""A server measured through HTTP: ours, with every part on one GPU in minutes, several replicas of it, or another.

    python benchmarks/serving                       # a CPU, minutes: the model that ships, short texts
    python benchmarks/serving --model qwen2.5-3b --window 32640 --sinks 128 --context 131072 --conversations 100 \\
        --tokens 384 --sizes 1,2 --state-dir /fast/disk --out serving.jsonl             # a GPU
    python benchmarks/serving --only replicas ...                                       # a replica on each GPU, by Ray
    python benchmarks/serving --vllm --model qwen2.5-3b --context 8192,32768,131072 --tokens 384        # vLLM's server
    python benchmarks/serving --url http://HOST:PORT --served NAME --vocabulary 151936 --context 32768   # another

Weights of shapes are random, the memory is new, and prompts are random token ids: what is said is not looked at. Parts:

- `read`: seconds to the first token of a text that is read anew;
- `second_turn`: the same of a turn that goes on from it, with its state on the GPU, in the CPU's memory, in a file that
  the system still has in memory, and in one that it has not; on a GPU also as it was when such a turn was read by a
  step for each of its tokens (`device_by_steps`);
- `throughput`: tokens per second of N conversations together; ours beside steps of the same batch with nothing around
  them;
- `pace`: seconds between a reply's tokens while others' texts of the same length are read;
- `idle`: memory of a GPU while conversations lie on disk;
- `replicas`: tokens per second of each replica and of all, and what becomes of conversations when one is killed.

A line of JSON is written as each part ends; one that fails says why, and the others go on. The table comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from client import Client
from own import GIB, OwnServer, service_of
from questions import FILLED, ONE, OWN, Questions, Row

from ahn.bench.records import code, hardware
from ahn.bench.shapes import SHAPES
from ahn.cli.env import environment
from ahn.measure.clock import release
from ahn.serve.api.messages import MessageStore
from ahn.serve.api.service import Service

if TYPE_CHECKING:
    from vllm_server import VLLMServer

PARTS = ("read", "second_turn", "throughput", "pace", "idle", "replicas")
OF_ANY = PARTS[:4]
"""What can be asked of a server that is not ours."""
SHARES = (1.0, 0.88, 0.75)
"""Of the conversations before: if there is no memory for as many, one more try and another."""


class Rows:
    """Writes a line as each part ends, and begins none once the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.seconds, self.begun = options.out, options.seconds, time.monotonic()
        self.shared: Row = {}
        self.written: list[Row] = []

    def write(self, row: Row) -> None:
        print(json.dumps(row), flush=True)
        if self.out:
            with self.out.open("a") as file:
                print(json.dumps(row), file=file)

    def part(self, name: str, ask: Callable[[], Row]) -> None:
        """One part's row."""
        start = time.monotonic()
        if start - self.begun > self.seconds:
            found: Row = {"skipped": f"{self.seconds:.0f} seconds were up"}
        else:
            try:
                found = ask()
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        row = {"part": name, **self.shared, **found, "took_s": round(time.monotonic() - start, 1)}
        self.written.append(row)
        self.write(row)


def main() -> None:
    options = parse()
    rows = Rows(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows.write({"hardware": hardware(device), "environment": environment(), "code": code()})
    if options.url:
        rows.shared = {"server": options.server}
        with contextlib.closing(Client(options.url, options.served, options.vocabulary)) as client:
            ask_all(rows, client, options)
    elif options.vllm:
        measure_vllm(rows, options)
    else:
        measure_own(rows, options)
    print(table(rows.written), flush=True)


def measure_own(rows: Rows, options: argparse.Namespace) -> None:
    """Our server on the first GPU, then replicas on all."""
    config = {name: getattr(options, name) for name in ("memory", "window", "sinks", "quantized")}
    rows.shared = {"model": options.model, **config}
    with tempfile.TemporaryDirectory(dir=options.state_dir) as folder:
        sizes = [int(size) for size in options.sizes.split(",")]

        def start(store: MessageStore) -> Service:
            return service_of({"model": options.model}, config, bounds(options, Path(folder)), sizes, store)

        if set(options.only) - {"replicas"}:
            with started(rows, start, options) as own, own.listening() as url:
                vocabulary = own.model.config.get_text_config(decoder=True).vocab_size
                with contextlib.closing(Client(url, "served", vocabulary)) as client:
                    ask_all(rows, client, options, own=own)
        if "replicas" in options.only:
            from replicas import measured

            given = {"model": options.model}, config, bounds(options, Path(folder)), sizes
            rows.part("replicas", lambda: measured(functools.partial(service_of, *given), options, Path(folder)))


def measure_vllm(rows: Rows, options: argparse.Namespace) -> None:
    """vLLM's server on the first GPU; of every context as many conversations as it has memory for."""
    import vllm_server

    rows.shared = {"server": f"vllm {version('vllm')}", "model": options.model}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        found: list[vllm_server.VLLMServer] = []

        def start() -> Row:
            found.append(stack.enter_context(vllm_server.started(options.model, options.context, Path(folder))))
            return found[0].row()

        rows.part("start", start)
        if not found:
            raise SystemExit(table(rows.written))
        vocabulary = SHAPES[options.model]["vocab_size"]
        client = stack.enter_context(contextlib.closing(Client(found[0].url, "served", vocabulary, counts=True)))
        ask_all(rows, client, options, vllm=found[0])


def bounds(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Of the engine."""
    made = {"conversations": options.conversations, "queue": 4 * options.conversations + 64}
    return made | {"state_dir": folder, "state_bytes": 64 * GIB, "device_bytes": options.device_bytes}


@contextlib.contextmanager
def started(rows: Rows, start: Callable[[MessageStore], Any], options: argparse.Namespace) -> Iterator[OwnServer]:
    """Our server, with fewer conversations where there is no memory for as many; how long it took is a row."""
    own: list[OwnServer] = []

    def begin() -> Row:
        own.append(OwnServer(start(MessageStore(None))))
        return {"conversations": options.conversations, "gpu_bytes": own[0].memory()}

    for share in SHARES:
        options.conversations = max(1, round(share * options.conversations))
        rows.part("start", begin)
        if own:
            yield own[0]
            return
        release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    raise SystemExit(table(rows.written))


def ask_all(
    rows: Rows,
    client: Client,
    options: argparse.Namespace,
    own: OwnServer | None = None,
    vllm: VLLMServer | None = None,
) -> None:
    """All parts that are wanted, of every context, in an order in which the most important come first."""
    made = FILLED if vllm else OWN if options.own_texts else ONE
    shared = rows.shared
    for context in options.context:
        held = vllm.conversations(context + options.tokens) if vllm else options.conversations
        questions = Questions(client, context, held, options.tokens, options.repeats, own)
        lengths = {context} if context < options.context[-1] else {context, *options.lengths}
        asked: dict[str, Callable[[], Row]] = {
            "second_turn": questions.second_turn,
            "throughput": functools.partial(questions.throughput, made),
            "pace": questions.pace,
            "idle": functools.partial(questions.idle, options.idle),
            "read": functools.partial(questions.read, sorted(lengths)),
        }
        rows.shared = shared | {"context": context}
        for name, ask in asked.items():
            if name in options.only and (own or name in OF_ANY):
                rows.part(name, ask)


def table(rows: list[Row]) -> str:
    """The numbers in short."""
    lines = []
    for row in rows:
        name = row["part"]
        for key, value in row.items():
            if key in ("failed", "skipped"):
                lines.append(f"{name:12} {key}: {value}")
            elif key.endswith(("_s", "_second")) and isinstance(value, float):
                lines.append(f"{name:12} {key:28} {value:12.4g}")
            elif isinstance(value, dict):
                said = (f"{k} {v:.4g}" for k, v in value.items() if isinstance(v, int | float))
                lines.append(f"{name:12} {key:28} {', '.join(said)}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a shape's name, a directory or Hub id, as of ahn bench")
    parser.add_argument("--memory", default="gated_deltanet")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--quantized", type=int, default=0)
    parser.add_argument("--context", type=_lengths, default=[2048], help="tokens of a text, several with commas")
    parser.add_argument("--lengths", type=_lengths, default=[512], help="more lengths of texts for `read`")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument(
        "--own-texts", action="store_true", help="throughput: every conversation reads a text of its own"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a reply")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--idle", type=int, default=4, help="conversations that are put on disk")
    parser.add_argument("--sizes", default="1,2", help="numbers of rows, besides all, for which steps are captured")
    parser.add_argument("--device-bytes", type=int, default=4 * GIB, help="of idle states on a GPU")
    parser.add_argument("--state-dir", type=Path, help="on the disk that is measured")
    parser.add_argument("--replicas", type=int, default=2, help="of the part of this name")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--vllm", action="store_true", help="start vLLM's server instead of ours")
    others.add_argument("--url", help="of another server; without it ours is started")
    parser.add_argument("--served", default="served", help="the name by which it knows its model")
    parser.add_argument("--server", default="", help="what rows call it: name and version")
    parser.add_argument("--vocabulary", type=int, default=1000, help="its token ids are below this")
    parser.add_argument("--seconds", type=float, default=900, help="after which no further part begins")
    parser.add_argument("--only", type=_parts, default=list(PARTS[:-1]), help=f"of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    options = parser.parse_args()
    if options.vllm and (options.model not in SHAPES or importlib.util.find_spec("vllm") is None):
        parser.error("--vllm needs vLLM, which has to be installed, and a shape: --model qwen2.5-3b, for example")
    return options


def _lengths(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


def _parts(names: str) -> list[str]:
    chosen = names.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    return chosen


if __name__ == "__main__":
    main()
