"""A process with an engine under load, to be killed: says each finished turn on its standard output.

    python killed.py FOLDER SEED

Each line: the conversation's number, the turn, prompt and reply as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path

from engines import ask, engine, model, prompt

CLIENTS = 4


def talk(running: object, number: int, draw: random.Random, lock: threading.Lock) -> None:
    ids = prompt(draw.randint(20, 60), seed=number)
    for turn in range(1000):
        got = ask(running, ids, draw.randint(2, 6), name=f"talk-{number}")  # type: ignore[arg-type]
        with lock:
            print(json.dumps([number, turn, ids, got.tokens]), flush=True)
        ids = [*ids, *got.tokens, *prompt(draw.randint(1, 20), seed=turn)]


def main(folder: str, seed: str) -> None:
    lock = threading.Lock()
    with engine(model(), state_dir=Path(folder), state_bytes=1 << 20) as running:
        print("[]", flush=True)
        own = [(int(seed) * CLIENTS + client, random.Random(client)) for client in range(CLIENTS)]
        threads = [threading.Thread(target=talk, args=(running, n, draw, lock), daemon=True) for n, draw in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
