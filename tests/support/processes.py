"""Functions run in other processes, alone or as torchrun would start several."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch


def in_other_processes(function: Callable[[int], None], ranks: int = 1, timeout: float = 120) -> list[int]:
    """Run `function(rank)` in forked processes, as torchrun would start them if there are several. Their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        from accelerate.state import AcceleratorState, GradientState

        torch.set_num_threads(
            1
        )  # a forked process makes its own pool: now, before threads that load weights race for it
        if (compiling := sys.modules.get("torch._inductor.async_compile")) is not None:
            compiling.AsyncCompile.pool.cache_clear()  # its threads are not forked: whoever compiles would wait
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            function(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]
