"""The basis in which a base's keys are coded at two bits (`AHNConfig.calibrated_keys`), from chats that it reads once.

python benchmarks/quality/make_chats.py --out train.jsonl --texts sotu,stdlib --count 64
python benchmarks/quality/calibrate_keys.py --chats train.jsonl --out DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ahn
from ahn.checkpoint import shipped
from ahn.training.calibration import calibrate


def calibrated(
    path: str, chats: Path, out: Path, count: int | None, window: int, sinks: int, quantized: int
) -> dict[str, Any]:
    """Calibrate a model on the first chats of a file, write the adapter, and say what was done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    config = ahn.AHNConfig(
        "window_only", window, sinks, quantized=quantized, key_bits=2, value_bits=2, calibrated_keys=True
    )
    model = ahn.attach(base.to(device).eval(), config)
    with chats.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in itertools.islice(lines, count)]
    shown = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    encoded = tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
    began = time.perf_counter()
    tokens = calibrate(model, (torch.tensor([ids]) for ids in encoded))
    seconds = time.perf_counter() - began
    ahn.save_adapter(model.to(torch.bfloat16), out)
    return {"chats": len(rows), "tokens": tokens, "read_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chats", type=Path, required=True, help="file of make_chats.py, of the training split")
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapter")
    parser.add_argument("--count", type=int, help="chats to read (default: all)")
    parser.add_argument("--window", type=int, default=480)
    parser.add_argument("--sinks", type=int, default=32)
    parser.add_argument("--quantized", type=int, default=7680, help="tokens that are coded")
    options = vars(parser.parse_args())
    print(json.dumps(calibrated(shipped.resolve(options.pop("model")), **options)))


if __name__ == "__main__":
    main()
