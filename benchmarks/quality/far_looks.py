"""In which ways a model finds what stands far back, if nothing is forgotten: many looks at the same keys and values.

    python benchmarks/quality/make_chats.py --out far.jsonl --split evaluation --kinds number --most 1 \\
        --near 57000 --length 65536 --count 20
    python benchmarks/quality/make_chats.py --out learn.jsonl --length 8192 --count 64 --seed 5
    python benchmarks/quality/far_looks.py --out looks.jsonl --chats far=far.jsonl --texts prose=moby-dick:8192:16 \\
        --learn learn.jsonl

Each text is read once with sinks and window alone, and its last tokens then look at everything before the window in
each of the ways of `looks()` (`real/looks.py`). A chat has one question at its end: the answer counts if each of its
tokens is the likeliest after the true ones before it. Of a plain text the loss of its last 240 tokens is kept; looks
that choose by what is asked choose by the 240 before them. A run begins with a line of `--out` of kind "run"; each
other line is one text with the results of all looks. What is there is not done again, and no text is begun after
`--seconds`. The table is printed last. It simulates: nothing of it is in the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from real import reading
from real.looks import Look, Memory, Reader
from real.sharing import learned, ranks
from real.ways import weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ahn.checkpoint import shipped
from ahn.cli.env import environment
from ahn.memory.retained_tokens import Scorer

ORDER = Path(__file__).parents[1] / "results" / "smollm2-simulation.jsonl"
RUN, NOTHING, FULL = "run", "sinks + window", "full attention"
TAIL = 480
"""Tokens at the end of a plain text that look; the loss is of the second half of them."""
AROUND = (40, 16)
"""Tokens before and after an answer in the text that belong to its fact."""
FINDERS = 10
"""Heads over whose attention to the fact the mean is taken."""
TEACHERS = 1
"""Of the heads that find, the first, which an early score learns from: on a CPU one taught better than ten."""
LEARNED = (4, 7, 9, 11)
"""Layers whose inputs tell one score a token for all heads."""
NOT_RANKED = ("all", "score", "oracle", "found")
"""Choices that do not rate blocks, or only once they are asked."""
Result = dict[str, Any]


def looks() -> list[Look]:
    """All that are compared: what showed something in a first run of ninety, and choices that could be built."""
    found = [Look(), Look("true", 4096), Look("one", 1024), Look(choice="score", slots=4096)]
    found += [Look(choice="found", slots=1024, finders=5)]
    few = Look(heads=20, sharp=2.0, steady=True)
    wide = dataclasses.replace(few, place="one")
    found += [few, wide, dataclasses.replace(few, sharp=1.5)]
    found += [dataclasses.replace(few, choice="score", slots=slots) for slots in (2048, 4096, 8192, 18432)]
    found += [dataclasses.replace(few, choice="found", slots=1024, finders=5)]
    ideal = {"choice": "blocks", "slots": 4096, "finders": 10}
    found += [Look(**ideal), dataclasses.replace(few, **ideal), dataclasses.replace(wide, **ideal)]
    found += [dataclasses.replace(few, **ideal | {"slots": slots}) for slots in (2048, 8192)]
    found += [dataclasses.replace(few, **ideal | {"finders": finders}) for finders in (1, 3)]
    choices = [{"choice": "layer blocks"}, {"choice": "head blocks"}]
    choices += [{"choice": "blocks so far", "finders": 10}, {"choice": "blocks", "finders": 10, "layer": 7}]
    choices += [{"choice": "learned", "layer": layer} for layer in LEARNED]
    for choice in choices:
        found += [dataclasses.replace(look, slots=4096, **choice) for look in (Look(), few)]
    chosen = {"choice": "blocks", "finders": 1, "slots": 4096}
    places = (
        ("true", 7680),
        ("true", 4096),
        ("one", 4096),
        ("one", 2048),
        ("one", 1024),
        ("one", 512),
        ("block", 4096),
    )
    for place, distance in places:
        found += [dataclasses.replace(x, place=place, distance=distance, **chosen) for x in (Look(), few)]
    for place, sharp in itertools.product(("block", "one"), (1.0, 1.5)):
        look = dataclasses.replace(few, place=place, sharp=sharp, steady=sharp != 1, **chosen)
        found += [look, dataclasses.replace(look, slots=16384), dataclasses.replace(look, heads=45, slots=8192)]
    return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Text:
    """One text (N,): of a chat where the reply begins, the answer's place, and the fact's; of a plain text none."""

    ids: torch.Tensor
    reply: int
    answer: slice | None = None
    fact: slice | None = None

    @property
    def said(self) -> slice:
        """Where in the text the answer stands."""
        return slice(self.fact.start + AROUND[0], self.fact.stop - AROUND[1])


def chat_of(tokenizer: Any, line: dict[str, Any]) -> Text:
    """A chat with one question."""
    ids, [answer] = reading.asked(tokenizer, line)
    before = tokenizer.apply_chat_template(line["messages"][:-1], tokenize=False, add_generation_prompt=True)
    reply = len(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"])
    wanted = ids[answer]
    at = (ids[:reply].unfold(0, len(wanted), 1) == wanted).all(-1).nonzero().flatten().tolist()
    if len(at) != 1 or not reply < answer.start:
        raise ValueError(f"The answer {line['asked'][0]['answer']} stands {len(at)} times in the text, and not once.")
    return Text(ids[: answer.stop], reply, answer, slice(at[0] - AROUND[0], at[0] + len(wanted) + AROUND[1]))


class Looks:
    """Runs all looks on texts."""

    def __init__(self, model: PreTrainedModel, reader: Reader, some: list[Look]) -> None:
        self.model, self.reader, self.looks = model, reader, some

    def chat(self, text: Text, done: Result, also_read: bool) -> Result:
        """Of each look: whether the answer is right, how many of its tokens are, the share of the attention of
        `FINDERS` heads that goes to the fact when they are due, in how many heads the fact is whole, and of looks that
        rate blocks how many are rated above the answer's, median over heads that see any."""
        found: Result = {}
        places = torch.arange(text.answer.start, text.answer.stop)
        target = text.ids[places]
        whole = self.reader.read(text.ids[: text.reply - Look.tail])
        for look in (None, *self.looks):
            name = NOTHING if look is None else look.name
            if name in done or (look and look.reading > also_read):
                continue
            start = text.reply - (Look.tail if look is None else look.tail)
            memory = self._memory(look, text.ids[:start], whole)
            seen = self.reader.look(look, text.ids, memory, places, text.reply, text.fact)
            right = seen.logits.argmax(-1).cpu() == target
            shares = [seen.shares[pair] for pair in self.reader.order[:FINDERS] if pair in seen.shares]
            share = round(sum(shares) / FINDERS, 4)
            found[name] = [bool(right.all()), int(right.sum()), share, sum(seen.held.values())]
            if look and look.choice not in NOT_RANKED:
                place = slice(text.said.start - self.reader.sinks, text.said.stop - self.reader.sinks)
                ratings = [x for x in self.reader.ratings(look, memory) if x is not None]
                found[name].append(float(torch.cat([ranks(x, place) for x in ratings]).float().median()))
        return found

    def text(self, text: Text, done: Result, also_read: bool) -> Result:
        """Of each look the loss of the last tokens."""
        found: Result = {}
        asked, N = len(text.ids) - TAIL // 2, len(text.ids)
        places, target = torch.arange(asked + 1, N), text.ids[asked + 1 :].to(self.model.device)
        whole = self.reader.read(text.ids[: N - TAIL])
        for look in (None, *self.looks):
            name = NOTHING if look is None else look.name
            if name in done or (
                look and (look.tail != Look.tail or look.choice == "oracle" or look.reading > also_read)
            ):
                continue
            memory = self._memory(look, text.ids[: N - TAIL], whole)
            logits = self.reader.look(look, text.ids, memory, places, asked).logits
            found[name] = round(F.cross_entropy(logits, target).item(), 5)
        if FULL not in done and self.model.config.max_position_embeddings >= N:
            logits = reading.logits_before(self.model, text.ids[None], places, None)[0].float()
            found[FULL] = round(F.cross_entropy(logits, target).item(), 5)
        return found

    def _memory(self, look: Look | None, ids: torch.Tensor, whole: Memory) -> Memory:
        return self.reader.read(ids, look) if look and look.reading else whole.before(len(ids))


def _scorers(model: PreTrainedModel, adapter: Path) -> list[Scorer]:
    weights, _ = weights_of(model, adapter)
    layers: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        number, rest = re.search(r"layers\.(\d+)\..*?scorer\.(.*)", name).groups()
        layers[int(number)][rest] = weight.float()
    text, found = model.config, []
    for number in range(text.num_hidden_layers):
        scorer = Scorer(text.hidden_size, text.num_key_value_heads).to(model.device)
        scorer.load_state_dict(layers[number])
        found.append(scorer)
    return found


def reader_of(name: str, adapter: str | None = None, window: int = 480, sinks: int = 32) -> tuple[Reader, Any]:
    """Of a model by name, with the scorers of an adapter or those that ship; and the model's tokenizer."""
    path = shipped.resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    order = next(row["order"] for row in map(json.loads, ORDER.open()) if row.get("part") == "rank")
    scorers = _scorers(model, Path(shipped.resolve_adapter(name, adapter, "retained")))
    return Reader(model, window, sinks, [(layer, head) for layer, head in order], scorers), tokenizer


def shown(tokenizer: Any, file: Path) -> list[torch.Tensor]:
    """The chats of a file as tokens (n,)."""
    lines = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in lines]
    return [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def texts(tokenizer: Any, options: argparse.Namespace) -> Iterator[tuple[str, int, Text]]:
    """Kind, number and text, the kinds in turn, so that what is done first says a little of each."""
    each: dict[str, list[Text]] = {}
    for kind, file in options.chats:
        lines = Path(file).read_text(encoding="utf-8").splitlines()[: options.count]
        each[kind] = [chat_of(tokenizer, json.loads(line)) for line in lines]
    for kind, source in options.texts:
        name, length, count = source.rsplit(":", 2)
        ids = reading.tokens_of(tokenizer, name)
        each[kind] = [Text(x, 0) for x in reading.pieces(ids, int(length), int(count))]
    for n in range(max(map(len, each.values()), default=0)):
        yield from ((kind, n, some[n]) for kind, some in each.items() if n < len(some))


def run(options: argparse.Namespace) -> bool:
    """Do what is not done; whether nothing is left."""
    began = time.perf_counter()
    reader, tokenizer = reader_of(options.model, options.adapter, options.window, options.sinks)
    some = [look for look in looks() if re.search(options.only, look.name)]
    if options.learn:
        torch.manual_seed(0)
        reader.learned = learned(reader, shown(tokenizer, options.learn), LEARNED, TEACHERS)
    else:
        some = [look for look in some if look.choice != "learned"]
    every = Looks(reader.model, reader, some)
    rows = rows_of(options.out)
    with options.out.open("a", encoding="utf-8") as out:
        kept = {name: getattr(options, name) for name in ("model", "window", "sinks")}
        out.write(json.dumps({"kind": RUN, **kept, **environment()}) + "\n")
    print(f"{len(every.looks)} looks; ready after {time.perf_counter() - began:.1f} s", flush=True)
    for kind, number, text in texts(tokenizer, options):
        started = time.perf_counter()
        if started - began > options.seconds:
            return False
        one = every.text if text.answer is None else every.chat
        if not (found := one(text, rows[kind, number], kind in options.reading.split(","))):
            continue
        seconds = round(time.perf_counter() - started, 1)
        row = {"kind": kind, "number": number, "length": len(text.ids), "looks": found, "seconds": seconds}
        with options.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{kind:8s} {number:3d} {seconds:7.1f} s", flush=True)
    return True


def rows_of(file: Path) -> dict[tuple[str, int], Result]:
    """By kind and number of a text, the results of all its looks."""
    found: dict[tuple[str, int], Result] = defaultdict(dict)
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        row = json.loads(line)
        if row["kind"] != RUN:
            found[row["kind"], row["number"]] |= row["looks"]
    return found


def table(rows: dict[tuple[str, int], Result]) -> str:
    """A line a look: of chats the answers found, of all, the share of attention, heads; of texts the loss."""
    each: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for (kind, _), results in rows.items():
        for name, result in results.items():
            each[name][kind].append(result)
    kinds, lines = sorted({kind for kind, _ in rows}), []
    for name, found in each.items():
        parts = [f"{name:52s}"]
        for kind in (kind for kind in kinds if kind in found):
            some = found[kind]
            if isinstance(some[0], list):
                right, tokens, share, held = (sum(x[n] for x in some) for n in range(4))
                count = len(some)
                parts.append(
                    f"{kind} {right:2d} of {count:2d} ({tokens / count:.1f} tokens, {100 * share / count:4.1f} %, "
                )
                parts[-1] += f"{held / count:4.1f} heads"
                above = [x[4] for x in some if len(x) > 4]
                parts[-1] += f", {statistics.median(above):.0f} blocks above)" if above else ")"
            else:
                parts.append(f"{kind} {sum(some) / len(some):.4f}")
        lines.append("  ".join(parts))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    def named(value: str) -> tuple[str, str]:
        kind, found, rest = value.partition("=")
        if not found:
            raise argparse.ArgumentTypeError(f"{value} is not KIND={rest or '…'}")
        return kind, rest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of rows")
    parser.add_argument(
        "--chats", type=named, action="append", default=[], help="KIND=FILE of make_chats.py, one fact each"
    )
    parser.add_argument("--texts", type=named, action="append", default=[], help="KIND=TEXT:TOKENS:COUNT")
    parser.add_argument("--count", type=int, default=40, help="chats of a file, at most")
    parser.add_argument("--learn", type=Path, help="chats of the training split that teach one score for all heads")
    parser.add_argument("--only", default="", help="looks whose names match this expression")
    parser.add_argument("--reading", default="", help="kinds that are also read with the looks; commas between")
    parser.add_argument("--seconds", type=float, default=500, help="begin no text later")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", help="scores of retained tokens (default: those that ship)")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    options = parser.parse_args(arguments)
    whole = run(options)
    print(table(rows_of(options.out)))
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
