"""Make ahn-tiny, the small real model that ships with the package, one stage at a time.

    python scripts/train_tiny.py prepare --out runs/tiny    # CPU: corpus, tokenizer, token ids
    python scripts/train_tiny.py base    --out runs/tiny    # GPU: the base model
    python scripts/train_tiny.py distill --out runs/tiny    # GPU: a memory of each kind
    python scripts/train_tiny.py card    --out runs/tiny    # model card from the logs; copies all into the package

`--smoke` runs a stage in a shape that a CPU finishes in about a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "base", "distill", "card"))
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to check the stage itself")
    parser.add_argument("--memory", action="append", help="distill this memory only (may be repeated)")
    arguments = parser.parse_args()
    if arguments.stage == "prepare":
        from tiny_stages.prepare import prepare

        prepare(arguments.out)
        return
    from tiny_stages.recipe import FULL, SMOKE

    recipe = SMOKE if arguments.smoke else FULL
    if arguments.stage == "base":
        from tiny_stages.base import train_base

        train_base(recipe, arguments.out)
    elif arguments.stage == "distill":
        from tiny_stages.distill import distill_memory
        from tiny_stages.recipe import MEMORIES

        for memory in arguments.memory or MEMORIES:
            distill_memory(recipe, arguments.out, memory)
    else:
        from tiny_stages.card import install, write_card

        write_card(recipe, arguments.out)
        if not arguments.smoke:
            install(arguments.out)


if __name__ == "__main__":
    main()
