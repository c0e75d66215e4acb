"""Attach a memory to a model, generate from a prompt longer than the window, and take the memory off again."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ahn


def main(prompt_tokens: int, new_tokens: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(ahn.tiny.path())
    tokenizer = AutoTokenizer.from_pretrained(ahn.tiny.path())
    text = "".join(f"def add_{n}(x):\n    return x + {n}\n\n\n" for n in range(prompt_tokens))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :prompt_tokens]
    with torch.no_grad():
        full_attention = model(ids[:, :256]).logits

    # 32 first and 224 most recent tokens stay exact. A new memory is untrained; here is one that was trained.
    ahn.load_adapter(model, ahn.tiny.adapter_path("deltanet"), window=224, sinks=32)
    with torch.no_grad():
        within_window = model(ids[:, :256]).logits
    print("within the window the output is the base model's:", torch.equal(within_window, full_attention))

    output = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(f"after {ids.shape[1]} tokens it goes on:", repr(tokenizer.decode(output[0, ids.shape[1] :])))
    print(f"the memory has {sum(p.numel() for p in ahn.adapter_parameters(model).values()):,} parameters")

    with ahn.disabled(model), torch.no_grad():  # full attention for a while
        model(ids[:, :512])
    ahn.detach(model)  # and for good: the model is as it was


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=40)
    main(**vars(parser.parse_args()))
