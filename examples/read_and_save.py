"""Read a long text once, keep the conversation in a file, and go on with it later, as often as you like."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ahn
from ahn.tiny.corpus import held_out_text


def main(length: int, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ahn.tiny.path())
    tokenizer = AutoTokenizer.from_pretrained(ahn.tiny.path())
    ahn.load_adapter(model, ahn.tiny.adapter_path("routed_deltanet"), window=224, sinks=32)

    # Python sources that the model never saw, with a fact between the first lines and the rest.
    book = "\n".join(text for _, text in held_out_text())
    first, rest = (tokenizer(part).input_ids for part in (book[:4000], book[4000:]))
    fact = tokenizer("\n# note: farm daisy\n").input_ids
    ids = torch.tensor([(first + fact + rest)[:length]])

    cache = ahn.AHNCache.for_model(model)
    with torch.no_grad():  # with gradients a text is not read in chunks
        model(ids, past_key_values=cache)
    cache.save(file)
    print(f"{cache.seen} tokens read, {file.stat().st_size / 2**20:.1f} MiB kept in {file}")

    cache = ahn.AHNCache.load(file, model)  # in another process, on another day
    for question in ("\n# recall: farm", "\ndef "):
        asked = tokenizer(question, return_tensors="pt").input_ids
        everything = torch.cat([ids, asked], dim=1)
        answer = model.generate(  # a copy of the cache per question; `generate` reads what the cache has not seen
            everything, past_key_values=copy.deepcopy(cache), max_new_tokens=8, pad_token_id=tokenizer.eos_token_id
        )
        print(repr(question), "->", repr(tokenizer.decode(answer[0, everything.shape[1] :])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192, help="tokens to read")
    parser.add_argument("--file", type=Path, default=Path("book.safetensors"))
    main(**vars(parser.parse_args()))
