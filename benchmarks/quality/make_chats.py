"""Chats over long texts with facts in them, as JSON lines that `ahn train` reads; no data set is downloaded.

    python benchmarks/quality/make_chats.py --out train.jsonl --texts moby-dick,sotu,stdlib --length 8192 --count 2000
    python benchmarks/quality/make_chats.py --out facts.jsonl --split evaluation --kinds number --most 1 --count 100

Facts, words, phrasings and texts of the split `evaluation` occur in no chat of the split `train`. Each line has
`messages` and `asked`: kind, question, answer, and how many tokens of the text follow what is asked for.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chats.items import KINDS
from chats.writer import ChatWriter, Plan
from transformers import AutoTokenizer

from ahn import files
from ahn.checkpoint import shipped
from ahn.measure.texts import read_texts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--texts", default="moby-dick,sotu,stdlib", help="texts by name, files, folders; commas between"
    )
    parser.add_argument("--model", default="smollm2", help="whose tokenizer and chat template are meant")
    parser.add_argument("--split", choices=["train", "evaluation"], default="train")
    parser.add_argument("--length", type=int, default=8192, help="tokens a chat")
    parser.add_argument("--count", type=int, default=1000, help="chats")
    parser.add_argument("--kinds", default=",".join((*KINDS, "quote")), help="what is asked; commas between")
    parser.add_argument("--most", type=int, default=8, help="items in one chat, at most")
    parser.add_argument("--near", type=int, default=64, help="nearest distance in tokens")
    parser.add_argument("--far", type=int, help="farthest distance in tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    plan = Plan(options.length, tuple(options.kinds.split(",")), options.most, options.near, options.far)
    texts = [text for name in options.texts.split(",") for text in read_texts(name)]
    writer = ChatWriter(AutoTokenizer.from_pretrained(shipped.resolve(options.model)), texts, options.split)
    with files.replacing(options.out) as partial, partial.open("w", encoding="utf-8") as out:
        seeds = (options.seed * 1_000_003 + n for n in range(options.count))
        with ThreadPoolExecutor() as threads:  # nearly all of the time is the tokenizer's, which needs no lock
            for chat in threads.map(lambda seed: writer.write(plan, seed), seeds):
                out.write(json.dumps(chat, ensure_ascii=False) + "\n")
    print(f"Wrote {options.count:,} chats of up to {options.length:,} tokens to {options.out}")


if __name__ == "__main__":
    main()
