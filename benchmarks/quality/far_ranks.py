"""Where the block of a fact stands among all blocks of a long text, by each way to choose blocks; needs no GPU.

    python benchmarks/quality/far_ranks.py --out ranks.jsonl --chats far.jsonl --learn learn.jsonl --kept runs/ranks

Files of chats as for `far_looks.py`, whose choices these are (`real/looks.py`). With sinks and window alone a token
depends on few tokens before it, so of each chat two pieces are read, and not the whole: one with the fact, and one from
elsewhere. Of both the first `WARM` tokens count for nothing. How many of a text's blocks are rated above the fact's is
estimated from the blocks of all these pieces. What was read stays in `--kept` and is not read again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from far_looks import FINDERS, RUN, Text, chat_of, reader_of, shown
from real.looks import BLOCK, Look, Memory, Reader, blocks_of
from real.sharing import learn
from safetensors.torch import load_file, save_file

from ahn import files
from ahn.cli.env import environment

WARM = 512
"""Tokens of a piece that are read for the sake of those behind them."""
BEFORE, BEHIND = 16, 15
"""Blocks before the fact in its piece, and blocks that count in the other piece."""
LAYERS = (4, 5, 6, 7, 8, 9)
"""Whose inputs tell one score for all heads."""
Tensors = dict[str, torch.Tensor]


def choices() -> dict[str, Look]:
    """All that are compared."""
    found = {name: Look(choice=name, slots=4096) for name in ("head blocks", "layer blocks")}
    found |= {f"blocks by {n}": Look(choice="blocks", slots=4096, finders=n) for n in (1, 2, 3, 5, 10, 20)}
    found["blocks so far"] = Look(choice="blocks so far", slots=4096, finders=FINDERS)
    found["blocks from layer 7"] = Look(choice="blocks", slots=4096, finders=FINDERS, layer=7)
    return found | {f"learned, layer {n}": Look(choice="learned", slots=4096, layer=n) for n in LAYERS}


def pieces(text: Text, sinks: int, seed: int) -> list[slice]:
    """Of a chat the piece with its fact, to the end of the block after it, and one from elsewhere; whole blocks."""
    first, last = ((x - sinks) // BLOCK for x in (text.fact.start, text.fact.stop - 1))
    fact = slice(sinks + max(0, first - BEFORE) * BLOCK, sinks + (last + 2) * BLOCK)
    length = WARM + BEHIND * BLOCK
    apart = [x for x in range(sinks, len(text.ids) - length, BLOCK) if x + length <= fact.start or fact.stop <= x]
    start = random.Random(seed).choice(apart)
    return [fact, slice(start, start + length)]


@torch.no_grad()
def read(reader: Reader, ids: torch.Tensor, last: int) -> Tensors:
    """Scores (Hkv, n) of the first layers of a text ids (n,), and inputs (n, D) of `LAYERS`."""
    found = {}
    for number, inputs, _, _ in reader.layers(ids):
        found[f"scores{number:02d}"] = reader.scored(reader.scorers[number], inputs).contiguous()
        if number in LAYERS:
            found[f"inputs{number}"] = inputs.half().contiguous()
        if number + 1 == last:
            break
    return found


def read_all(reader: Reader, texts: list[torch.Tensor], chats: list[Text], kept: Path) -> tuple[list[Tensors], ...]:
    """What is learned from, and what is asked, in `kept`."""
    layers = len(reader.decoder.layers)
    last, S = 1 + max(layer for layer, _ in reader.order[:FINDERS]), reader.sinks

    def once(name: str, make: Any) -> Tensors:
        file = kept / f"{name}.safetensors"
        if not file.exists():
            found = make()
            with files.replacing(file) as partial:
                save_file(found, partial)
            print(file.stem, flush=True)
        return load_file(file)

    def of_chat(number: int, text: Text) -> Tensors:
        parts = pieces(text, S, number)
        found = {"segments": torch.tensor([[part.start for part in parts], [part.stop for part in parts]])}
        for k, part in enumerate(parts):
            some = read(reader, torch.cat([text.ids[:S], text.ids[part]]), layers)
            found |= {f"{k}.{name}": x for name, x in some.items()}
        return found

    asked = [once(f"far{n}", lambda n=n, text=text: of_chat(n, text)) for n, text in enumerate(chats)]
    return [once(f"train{n}", lambda ids=ids: read(reader, ids, last)) for n, ids in enumerate(texts)], asked


def teach(reader: Reader, texts: list[Tensors]) -> None:
    """Learn one score for all heads from what was read."""
    heads = reader.order[:FINDERS]
    wanted = [torch.stack([x[f"scores{n:02d}"][h] for n, h in heads]).sigmoid().mean(0)[reader.sinks :] for x in texts]
    for number in LAYERS:
        inputs = torch.cat([x[f"inputs{number}"][reader.sinks :] for x in texts])
        reader.learned[number] = learn(inputs, torch.cat(wanted))


def rated(reader: Reader, look: Look, some: Tensors, piece: int) -> torch.Tensor:
    """(H, blocks) of a piece by all layers or heads that choose with this look."""
    scores = [F.pad(some[f"{piece}.scores{n:02d}"], (0, reader.window)) for n in range(len(reader.decoder.layers))]
    memory = Memory([], [], scores)
    if look.choice == "learned":
        inputs = some[f"{piece}.inputs{look.layer}"].float()
        memory.learned[look.layer] = F.pad(reader.scored(reader.learned[look.layer], inputs), (0, reader.window))
    return torch.cat([blocks_of(x, look.choice) for x in reader.ratings(look, memory) if x is not None])


def ranked(reader: Reader, chats: list[Text], asked: list[Tensors]) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Of each choice its name, the share of other blocks above the answer's worst, (chats, H), and how many others."""
    S = reader.sinks
    for name, look in choices().items():
        own, others = [], []
        for text, some in zip(chats, asked, strict=True):
            start = int(some["segments"][0, 0])
            first, last = ((x - start) // BLOCK for x in (text.fact.start, text.fact.stop - 1))
            said, until = ((x - start) // BLOCK for x in (text.said.start, text.said.stop - 1))
            here, there = (rated(reader, look, some, piece) for piece in (0, 1))
            own.append(here[:, said : until + 1].amin(1))
            warm = 0 if start == S else WARM // BLOCK
            others += [here[:, warm:first], here[:, last + 1 :], there[:, WARM // BLOCK :]]
        background = torch.cat(others, dim=1)
        above = (background[None] > torch.stack(own)[:, :, None]).float().mean(2)
        yield name, above, background.shape[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of rows")
    parser.add_argument("--chats", type=Path, required=True, help="file of make_chats.py, one fact each")
    parser.add_argument("--learn", type=Path, required=True, help="the same, of the training split")
    parser.add_argument("--kept", type=Path, required=True, help="directory for what was read")
    parser.add_argument("--count", type=int, default=14, help="chats that are asked")
    parser.add_argument("--lessons", type=int, default=3, help="chats to learn from")
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    reader, tokenizer = reader_of(options.model)
    lines = [json.loads(line) for line in options.chats.read_text(encoding="utf-8").splitlines()[: options.count]]
    chats = [chat_of(tokenizer, line) for line in lines]
    options.kept.mkdir(parents=True, exist_ok=True)
    texts, asked = read_all(reader, shown(tokenizer, options.learn)[: options.lessons], chats, options.kept)
    teach(reader, texts)
    with options.out.open("a", encoding="utf-8") as out:
        kept = {"model": options.model, "window": reader.window, "sinks": reader.sinks, "what": "ranks"}
        out.write(json.dumps({"kind": RUN, **kept, **environment()}) + "\n")
        for name, above, others in ranked(reader, chats, asked):
            blocks = [(len(text.ids) - reader.sinks - reader.window) // BLOCK for text in chats]
            ranks = (above * torch.tensor(blocks)[:, None]).round().int()
            row = {"kind": "ranks", "choice": name, "others": others, "blocks": blocks, "above": ranks.tolist()}
            out.write(json.dumps(row) + "\n")
            print(f"{name:24s} {(ranks < 64).float().mean():6.1%} within 64, median {int(ranks.median()):4d} above")


if __name__ == "__main__":
    main()
