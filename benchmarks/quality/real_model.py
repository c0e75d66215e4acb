"""What remains of a long text on a pretrained instruct model: losses of prose and code, facts asked through the chat.

    python benchmarks/quality/make_chats.py --out one.jsonl --split evaluation --kinds number --most 1 --near 700
    python benchmarks/quality/real_model.py --chats one.jsonl --text prose=moby-dick --text code=FOLDER --out DIR

Each row is a way to read (full attention, sinks + window, tier, memories) with the bytes of its cache, the loss beyond
the exact tokens, the share of the gap between sinks + window and full attention that it wins back, and the share of
facts whose every token is the likeliest, with its 95 % interval. Rows are appended to rows.jsonl as they are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ahn
from ahn import shipped
from ahn.cli.env import environment
from ahn.measure.intervals import wilson
from ahn.measure.method import Method
from ahn.measure.reading import bytes_of_cache, new_cache
from ahn.measure.texts import read_texts


def pieces(tokenizer: Any, text: str, length: int, count: int) -> list[Tensor]:
    """So many pieces (length,) of a text, evenly spaced."""
    joined = "\n\n".join(part.text.strip() for part in read_texts(text))
    ids = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return [ids[start : start + length] for start in starts]


def asked(tokenizer: Any, chat: dict[str, Any]) -> tuple[Tensor, list[slice]]:
    """A chat's tokens (L,), and where each of its answers stands among them."""
    text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans, at = [], 0
    for message, item in zip(chat["messages"][1::2], chat["asked"], strict=True):
        at = text.index(message["content"], at)
        first = at + message["content"].rindex(item["answer"])
        last = first + len(item["answer"])
        inside = [n for n, (begin, end) in enumerate(encoded["offset_mapping"]) if begin < last and end > first]
        spans.append(slice(inside[0], inside[-1] + 1))
        at += len(message["content"])
    return torch.tensor(encoded["input_ids"]), spans


@torch.no_grad()
def logits_before(model: PreTrainedModel, ids: Tensor, wanted: Tensor, cache: Any) -> Tensor:
    """Logits (len(wanted), V) of the tokens at these places, from the tokens before each."""
    output = model(ids[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=wanted - 1)
    return output.logits[0].float()


def read(model: PreTrainedModel, texts: dict[str, list[Tensor]], exact: int) -> Iterator[tuple[str, float, int]]:
    """Of each kind of text its mean loss beyond the exact tokens, and the bytes of the last cache."""
    for kind, parts in texts.items():
        total = 0.0
        for ids in parts:
            cache = new_cache(model)
            wanted = torch.arange(exact + 1, len(ids))
            logits = logits_before(model, ids, wanted, cache)
            total += F.cross_entropy(logits, ids[wanted].to(logits.device)).item()
        yield kind, total / len(parts), bytes_of_cache(cache)


def recalled(model: PreTrainedModel, chats: list[tuple[Tensor, list[slice]]]) -> list[bool]:
    """Of each answer in the chats, whether every token of it is the likeliest."""
    found = []
    for ids, spans in chats:
        places = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        best = logits_before(model, ids, places, new_cache(model)).argmax(-1).cpu()
        right = best == ids[places]
        found += [bool(part.all()) for part in right.split([span.stop - span.start for span in spans])]
    return found


def methods(options: argparse.Namespace) -> Iterator[Method]:
    """The rows: full attention, sinks + window, tiers of several bits, adapters, and tier before an adapter."""
    fields = {"window": options.window, "sinks": options.sinks}
    yield Method("full attention")
    yield Method("sinks + window", ahn.AHNConfig("window_only", **fields))
    for described in options.tier:
        capacity, *bits = (int(part) for part in described.split("/"))
        more = dict(zip(("key_bits", "value_bits"), bits, strict=False))
        config = ahn.AHNConfig("window_only", **fields, quantized=capacity, **more)
        yield Method(f"tier {described}", config)
    for path in options.adapter:
        settings = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["ahn"]
        known = {name: settings[name] for name in ("memory", "slots", "key_bits", "value_bits") if name in settings}
        yield Method(Path(path).name, ahn.AHNConfig(**known, **fields), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chats", action="append", default=[], help="file of make_chats.py, of the evaluation's split")
    parser.add_argument("--text", action="append", default=[], help="KIND=TEXT, a text as make_chats.py knows them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--length", type=int, default=8192, help="tokens of each text")
    parser.add_argument("--count", type=int, default=8, help="texts of each kind")
    parser.add_argument("--tier", action="append", default=[], help="TOKENS or TOKENS/KEY_BITS/VALUE_BITS")
    parser.add_argument("--adapter", action="append", default=[], help="directory of an adapter")
    parser.add_argument(
        "--skip-full", action="store_true", help="leave full attention out, for texts beyond its length"
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = shipped.resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    base = base.to(device).eval()
    texts = {}
    for given in options.text:
        kind, _, name = given.partition("=")
        texts[kind] = pieces(tokenizer, name, options.length, options.count)
    chats = {}
    for file in map(Path, options.chats):
        lines = file.read_text(encoding="utf-8").splitlines()
        chats[file.stem] = [asked(tokenizer, json.loads(line)) for line in lines]
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for method in methods(options):
        if method.config is None and options.skip_full:
            continue
        began = time.perf_counter()
        row: dict[str, Any] = {"method": method.name, "window": options.window, "sinks": options.sinks}
        with method.on(base):
            for kind, loss, size in read(base, texts, options.window + options.sinks):
                row |= {f"{kind}_loss": loss, "cache_bytes": size}
            for kind, group in chats.items():
                right = recalled(base, group)
                row |= {f"{kind}_right": sum(right), f"{kind}_asked": len(right)}
        row |= {"seconds": round(time.perf_counter() - began, 1), "length": options.length, **environment()}
        rows.append(row)
        with (options.out / "rows.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(line_of(row, rows, list(texts), list(chats)), flush=True)


def line_of(row: dict[str, Any], rows: list[dict[str, Any]], texts: list[str], chats: list[str]) -> str:
    """One row of the table that is printed."""
    parts = [f"{row['method']:28s}", f"{row.get('cache_bytes', 0) / 2**20:7.1f} MiB"]
    full, window = (
        next((r for r in rows if r["method"] == name), None) for name in ("full attention", "sinks + window")
    )
    for kind in texts:
        loss = row[f"{kind}_loss"]
        parts.append(f"{kind} {loss:.3f}")
        if full and window:
            gap = window[f"{kind}_loss"] - full[f"{kind}_loss"]
            parts.append(f"({100 * (window[f'{kind}_loss'] - loss) / gap:5.1f} %)")
    for kind in chats:
        low, high = wilson(row[f"{kind}_right"], row[f"{kind}_asked"])
        share = row[f"{kind}_right"] / row[f"{kind}_asked"]
        parts.append(f"{kind} {100 * share:5.1f} % [{100 * low:.0f}, {100 * high:.0f}]")
    return "  ".join((*parts, f"{row['seconds']} s"))


if __name__ == "__main__":
    main()
