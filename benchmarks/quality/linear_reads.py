"""What stops a linear memory: which tokens it holds, how it holds them, or how it is read. Nothing is trained.

    python benchmarks/quality/linear_reads.py --out linear.jsonl --chats 64 --texts 16 --device cuda --dtype bfloat16

A pretrained model reads chats with one number and plain texts. In each layer a query sees sinks and window exactly, and
some of the tokens that left in one of the ways of `WAYS`. Such tokens together get the share of the attention that the
base's own softmax gives them (an oracle): out = (1 - share) near + share read. So ways differ only in what is read:

- softmax: the base's own attention to these tokens.
- lossless: a state with S k = v for each of the fact's few tokens, by the pseudo-inverse, read as S q.
- delta: the published DeltaNet with β = 1 for these tokens and 0 for others: keys and queries of length one, after
  RoPE, reads of equal length (its RMSNorm).
- hindsight: the state that fits the text's own later queries best: ridge regression of the softmax read on queries from
  before RoPE, weighted by the share squared, in the stream where it is read. No fixed 64 × 64 state does better.

"Scaled" reads are multiplied by a number for each head, fitted on other chats to the softmax read of the same tokens.
The fact's sentence is chosen by an oracle; "passage" is the 64 tokens next to each other that the scores which ship
(`retained-passages`) rate best. A state of 64 × 64 numbers has the bytes of the keys and values of 32 tokens.

Hypotheses: (choice) to write the right tokens is enough: then delta and lossless states of the fact find it; (storage)
tokens disturb each other in a state: then lossless finds it and delta does not; (reading) queries that were made for a
softmax do not single out a key in a linear read: then lossless fails, too, where softmax finds it. What is predicted of
each way stands in `WAYS`. Each way is one line of `--out`, written when it is done; what is there is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chats.writer import SENTENCE_END, ChatWriter, Plan, texts_of
from real import reading
from real.mixing import Mixer, Way, read
from real.ways import weights_of
from stages.intervals import bootstrap
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ahn.checkpoint import shipped
from ahn.cli.env import environment
from ahn.measure.intervals import wilson
from ahn.measure.texts import Text as Source
from ahn.measure.texts import read_texts
from ahn.memory.retained_tokens import Scorer

PASSAGE = 64
SEED = 17_000_051
"""Of the first chat; those of the reports begin at 0."""
FITTED = 8
"""Scales are fitted on one other chat for so many."""
FULL, WINDOW = "full attention", "sinks + window"
WAYS = {
    FULL: Way("all", predicted=(65, 100, 100)),
    WINDOW: Way("none", predicted=(0, 0, 0)),
    "fact, softmax": Way("fact", predicted=(80, None, None)),
    "fact, lossless, scaled": Way("fact", "lossless", False, "scaled", predicted=(5, None, None)),
    "fact, lossless, normalised": Way("fact", "lossless", False, "normalised", predicted=(3, None, None)),
    "fact, delta": Way("fact", "delta", predicted=(3, None, None)),
    "all, delta": Way("all", "delta", predicted=(0, -20, -5)),
    "all, hindsight": Way("all", "hindsight", False, predicted=(5, 50, 12)),
    "fact, hindsight": Way("fact", "hindsight", False, predicted=(50, None, None)),
    "fact, softmax before RoPE": Way("fact", "softmax", False, predicted=(40, None, None)),
    "fact, lossless after RoPE, scaled": Way("fact", "lossless", True, "scaled", predicted=(8, None, None)),
    "fact, delta before RoPE": Way("fact", "delta", False, predicted=(2, None, None)),
    "passage, softmax": Way("passage", predicted=(45, None, None)),
    "passage, delta": Way("passage", "delta", predicted=(0, None, None)),
    "all, hindsight every 1024": Way("all", "hindsight", False, every=1024, predicted=(30, 70, 30)),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """One text (L,), the tokens that are to be predicted, and of a chat where its fact's sentence stands."""

    ids: Tensor
    wanted: Tensor
    fact: slice | None = None


class Study:
    """Runs ways on texts.

    Args:
        scorer: of one score for all heads, from the input of `score_layer`.
        fitted: chats that scales are fitted on.
        batch: texts read at once; shorter ones are padded at their end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        window: int,
        sinks: int,
        scorer: Scorer,
        score_layer: int,
        fitted: Sequence[Text],
        batch: int = 8,
    ) -> None:
        self.model, self.window, self.sinks = model, window, sinks
        self.scorer, self.score_layer, self.fitted, self.batch = scorer, score_layer, fitted, batch

    def run(self, way: Way, texts: Sequence[Text]) -> list[float]:
        """One result a text: of a chat 1 if each token of the answer is the likeliest, else 0; else the mean loss."""
        scales = self.scales(way) if way.scaled else ()
        return [x for some in self.batches(texts) for x in self.results(self.read(way, some, scales=scales), some)]

    def batches(self, texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
        """`batch` texts at a time."""
        return (texts[n : n + self.batch] for n in range(0, len(texts), self.batch))

    def read(self, way: Way, texts: Sequence[Text], until: int | None = None, **more: Any) -> Tensor:
        """Hidden states (B, N, D), as `mixing.read`; `more` goes to the `Mixer`."""
        lengths = torch.tensor([len(text.ids) for text in texts], device=self.model.device)
        ids = torch.nn.utils.rnn.pad_sequence([text.ids for text in texts], batch_first=True).to(self.model.device)
        mixer = Mixer(way, self.window, self.sinks, lengths, self.places(way, texts), **more)
        return read(self.model, ids, mixer, until)

    @torch.no_grad()
    def results(self, hidden: Tensor, texts: Sequence[Text]) -> Iterator[float]:
        """One number a text, of hidden states (B, N, D)."""
        for x, text in zip(hidden, texts, strict=True):
            logits = self.model.lm_head(x[(text.wanted - 1).to(x.device)]).float()
            target = text.ids[text.wanted].to(x.device)
            if text.fact is None:
                yield F.cross_entropy(logits, target).item()
            else:
                yield float((logits.argmax(-1) == target).all())

    def scales(self, way: Way) -> list[Tensor]:
        """Of each layer (Hq,): least squares of the way's linear reads against the softmax's, while that is read."""
        total: list[Tensor] = []
        for some in self.batches(self.fitted):
            sums: list[Tensor] = []
            self.read(way, some, sums=sums)
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        return [x[0] / x[1].clamp_min(1e-20) for x in total]

    def places(self, way: Way, texts: Sequence[Text]) -> Tensor | None:
        """(B, n) the tokens that are read, -1 where there are fewer; None for all."""
        if way.tokens in ("none", "all"):
            return None
        if way.tokens == "passage":
            return self.passages(texts)[:, None] + torch.arange(PASSAGE, device=self.model.device)
        facts = [torch.arange(text.fact.start, text.fact.stop) for text in texts if text.fact is not None]
        padded = torch.nn.utils.rnn.pad_sequence(facts, batch_first=True, padding_value=-1)
        return padded.to(self.model.device)

    @torch.no_grad()
    def passages(self, texts: Sequence[Text]) -> Tensor:
        """(B,) where the best rated passage begins, of what has left the window when the answer begins."""
        scores = self.scorer(self.read(WAYS[WINDOW], texts, self.score_layer))[:, 0].float().sigmoid()
        answers = torch.stack([text.wanted[0] for text in texts])[:, None].to(scores.device)
        at = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill((at < self.sinks) | (at >= answers - self.window), -1)
        return F.avg_pool1d(scores[:, None], PASSAGE, 1)[:, 0].argmax(-1)


def chat_of(tokenizer: Any, chat: dict[str, Any]) -> Text:
    """A chat of `ChatWriter` with one question, up to its answer."""
    ids, [answer] = reading.asked(tokenizer, chat)
    text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    said = text.index(chat["asked"][0]["answer"])
    begin = max(match.end() for match in SENTENCE_END.finditer(text, 0, said))
    end = text.index(".", said) + 1
    inside = [n for n, (first, last) in enumerate(offsets) if first < end and last > begin]
    return Text(ids[: answer.stop], torch.arange(answer.start, answer.stop), slice(inside[0], inside[-1] + 1))


def plain(tokenizer: Any, sources: Sequence[Source], length: int, count: int, exact: int) -> list[Text]:
    """Evenly spaced pieces of texts."""
    if not count:
        return []
    encoded = tokenizer("\n\n".join(x.text.strip() for x in sources), add_special_tokens=False, verbose=False)
    pieces = reading.pieces(torch.tensor(encoded["input_ids"]), length, count)
    return [Text(ids, torch.arange(exact + 1, length)) for ids in pieces]


def study_of(o: argparse.Namespace) -> tuple[Study, dict[str, list[Text]]]:
    """The study, and its texts by kind."""
    path = shipped.resolve(o.model)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, o.dtype)).to(o.device).eval()
    weights, config = weights_of(model, Path(o.adapter))
    scorer = Scorer(model.config.hidden_size, 1).to(o.device, model.dtype)
    scorer.load_state_dict({name.rpartition("scorer.")[2]: x for name, x in weights.items() if "scorer." in name})
    books = [texts_of("evaluation", read_texts(name)) for name in o.books.split(",")]
    writer = ChatWriter(tokenizer, [text for book in books for text in book], "evaluation")
    plan = Plan(o.length, ("number",), 1, o.length // 8)
    exact, others = o.window + o.sinks, max(1, o.chats // FITTED)
    with ThreadPoolExecutor() as threads:  # nearly all of the time is the tokenizer's, which needs no lock
        lines = threads.map(lambda n: writer.write(plan, SEED + n), range(others + o.chats))
        chats = [chat_of(tokenizer, line) for line in lines]
    assert config.score_layer is not None
    study = Study(model, o.window, o.sinks, scorer, config.score_layer, chats[:others], o.batch)
    return study, {
        "chats": chats[others:],
        "prose": plain(tokenizer, books[0], o.length, o.texts, exact),
        "code": plain(tokenizer, read_texts(o.code), o.length, o.texts // 2, exact),
    }


def row_of(study: Study, name: str, texts: dict[str, list[Text]], rows: dict[str, Any]) -> dict[str, Any]:
    """What one way gives: numbers found, with Wilson's interval; losses, and what is won back, with bootstrap's."""
    row: dict[str, Any] = {"name": name, "predicted": WAYS[name].predicted}
    began = time.perf_counter()
    for kind, some in texts.items():
        if not some or (kind != "chats" and WAYS[name].tokens not in ("none", "all")):
            continue
        found = study.run(WAYS[name], some)
        if kind == "chats":
            right = int(sum(found))
            interval, each = wilson(right, len(found)), [x == 1 for x in found]
            row[kind] = {"n": len(found), "right": right, "interval": interval, "found": each}
            continue
        row[kind] = {"n": len(found), "loss": sum(found) / len(found), "losses": [round(x, 5) for x in found]}
        if FULL in rows and WINDOW in rows:
            columns = [np.array(rows[other][kind]["losses"]) for other in (WINDOW, FULL)]
            won = bootstrap(
                lambda x, window, full: (window - x) / (window - full), [np.array(found), *columns], range(len(found))
            )
            row[kind] |= {"won": won[0], "interval": won[1:]}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def table(rows: dict[str, Any]) -> str:
    """A line a way; in brackets what was predicted."""
    lines = []
    for name, row in rows.items():
        parts = [f"{name:36s}"]
        for kind, predicted in zip(("chats", "prose", "code"), row["predicted"], strict=True):
            if kind not in row:
                continue
            one = row[kind]
            parts.append(kind + (f" {one['loss']:.3f}" if "loss" in one else ""))
            if "interval" in one:
                share = one["won"] if "won" in one else one["right"] / one["n"]
                parts[-1] += " {:.0f} % ({:.0f} to {:.0f})".format(*(100 * x for x in (share, *one["interval"])))
            parts[-1] += f" [{predicted}]"
        lines.append("  ".join((*parts, f"{row['seconds']} s")))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    sympy = importlib.util.find_spec("sympy")  # torch needs it; no training of ours reads it, and no report
    code = str(Path(sympy.origin).parent / "solvers") if sympy and sympy.origin else "stdlib"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of rows")
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--texts", type=int, default=16, help="pieces of prose, and half as many of code")
    parser.add_argument("--only", default="", help="ways whose names match this expression")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="texts read at once")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text or chat")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--books", default="sotu,stdlib", help="texts of the chats, the first of them the prose")
    parser.add_argument("--code", default=code, help="a folder of sources")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", help="with one score for all heads (default: the one that ships)")
    o = parser.parse_args(arguments)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    o.adapter = shipped.resolve_adapter(o.model, o.adapter, "retained-passages")
    if o.adapter is None:
        parser.error(f"no adapter comes with {o.model}: name one with one score for all heads, --adapter DIR")
    lines = o.out.read_text(encoding="utf-8").splitlines() if o.out.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    run = {name: getattr(o, name) for name in ("model", "window", "sinks", "length", "chats", "texts", "dtype")}
    if any(row["run"] != run for row in rows.values()):
        parser.error(f"the rows of {o.out} are of another run: name another file")
    left = [name for name in WAYS if name not in rows and re.search(o.only, name)]
    study, texts = study_of(o) if left else (None, {})
    for name in left:
        assert study is not None
        rows[name] = row_of(study, name, texts, rows)
        with o.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(rows[name] | {"run": run} | environment()) + "\n")
        print(f"{name:36s} {rows[name]['seconds']:7.1f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
