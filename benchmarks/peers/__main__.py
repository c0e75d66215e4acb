"""ahn beside what people would really use: full attention in vLLM and in transformers, one shape, one GPU, one run.

    python benchmarks/peers --out peers.jsonl                             # all systems
    python benchmarks/peers --only ours,vllm --contexts 32768,131072      # some of them

Random weights, random tokens, bfloat16. Of each system and context: seconds to read a prompt, seconds a token at
batch 1, and tokens per second of as many conversations as the memory holds. Each system has a process and the GPU
to itself; every row is written when it is measured. `vllm-fp8` is vLLM with keys and values of 8 bits.
benchmarks/README.md says how vLLM is set.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from plan import Rows

from ahn.bench.shapes import SHAPES

SYSTEMS = {"ours": "ours", "transformers": "full", "vllm": "peer_vllm", "vllm-fp8": "peer_vllm"}
"""Modules that measure them, imported in their processes alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=systems, default=list(SYSTEMS), help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--model", choices=list(SHAPES), default="qwen2.5-3b")
    parser.add_argument("--contexts", type=lengths, default=[32768, 131072, 524288], help="tokens, with commas")
    parser.add_argument("--memory", default="gated_deltanet")
    parser.add_argument("--window", type=int, default=32640)
    parser.add_argument("--sinks", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which a system begins nothing long")
    parser.add_argument("--splits", type=int, default=64, help="of a sequence's keys in vLLM's captured steps")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    parser.add_argument("--here", action="store_true", help="in this process, for one system")
    options = parser.parse_args()
    if any(name.startswith("vllm") for name in options.only) and importlib.util.find_spec("vllm") is None:
        parser.error(
            "vLLM is not installed. Install a version for this torch (0.25.1 has torch 2.11), or leave it out: "
            "--only ours,transformers"
        )
    if options.here:
        (name,) = options.only
        rows = Rows(options.out, {"system": name}, time.monotonic() + options.limit)
        importlib.import_module(SYSTEMS[name]).measure(options, rows)
        return
    failed = False
    for name in options.only:
        command = [sys.executable, str(Path(__file__).parent), *sys.argv[1:], "--only", name, "--here"]
        if code := subprocess.run(command).returncode:
            failed = True
            Rows(options.out, {"system": name}, 0.0).write(status="failed", why=f"the process ended with {code}")
    sys.exit(failed)


def systems(names: str) -> list[str]:
    """Of a list with commas, in the order of SYSTEMS."""
    chosen = names.split(",")
    if unknown := set(chosen) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"no system {min(unknown)!r}; there are {', '.join(SYSTEMS)}")
    return [name for name in SYSTEMS if name in chosen]


def lengths(text: str) -> list[int]:
    """Numbers of a list with commas, ascending."""
    return sorted(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
