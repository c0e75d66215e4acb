"""From a plan to rows. A row that runs out of memory, or fails in any other way, says so, and the next one begins."""

import contextlib
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ahn.bench import decode, memory, prefill, train
from ahn.bench.records import OK, OUT_OF_MEMORY, Log, Row
from ahn.bench.stand import Skipped, Stand
from ahn.config import AHNConfig
from ahn.errors import AHNError, is_out_of_memory
from ahn.measure.clock import release
from ahn.measure.method import Method, forget_compiled

MEASUREMENTS: dict[str, Callable[[Stand, Method, int, int], Row]] = {
    "prefill": prefill.measure,
    "decode": decode.measure,
    "memory": memory.measure,
    "throughput": decode.throughput,
    "train": train.measure,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One measurement with everything that it is to be made for, contexts and batches ascending."""

    measurement: str
    methods: Sequence[Method]
    contexts: Sequence[int]
    batches: Sequence[int]


def run(stand: Stand, plan: Plan, shared: Row, log: Log, say: Callable[[Row], Any]) -> None:
    """Measure and write all rows of a plan."""

    def record(row: Row) -> None:
        row = {"measurement": plan.measurement, **shared, **row}
        log.write(row)
        say(row)

    with _only_new_objects_collected():
        for method in plan.methods:
            try:
                with method.on(stand.model, training=plan.measurement == "train"):
                    for context in plan.contexts:
                        _batches(stand, plan, method, context, record)
            except Exception as error:  # attaching is refused for some models, memories and adapters
                record(_described(method) | _failure(error))
            release(stand.device)


@contextlib.contextmanager
def _only_new_objects_collected() -> Iterator[None]:
    """Garbage collection, before every row and now and then in one, need not walk through all of torch each time.

    A caller who has frozen objects keeps them so: Python thaws all or none.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _batches(stand: Stand, plan: Plan, method: Method, context: int, record: Callable[[Row], None]) -> None:
    for batch in plan.batches:
        start = time.perf_counter()
        found = _attempt(stand, plan.measurement, method, context, batch)
        if method.static:
            forget_compiled(stand.model)
        release(stand.device)
        row = _described(method) | {"context": context, "batch": batch}
        record(row | found | {"row_s": time.perf_counter() - start})
        if found["status"] == OUT_OF_MEMORY:
            return  # more conversations need more


def _attempt(stand: Stand, measurement: str, method: Method, context: int, batch: int) -> Row:
    torch.manual_seed(0)
    measure = MEASUREMENTS[measurement]
    try:
        if measurement == "train":
            return {"status": OK, **measure(stand, method, context, batch)}
        with method.without_gradients():
            return {"status": OK, **measure(stand, method, context, batch)}
    except Exception as error:
        # The error's frames hold the tensors that filled the memory; only text outlives this block.
        return _failure(error)


def _failure(error: Exception) -> Row:
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return {"status": OUT_OF_MEMORY, "why": text}
    if isinstance(error, Skipped):
        return {"status": "skipped", "why": text}
    if isinstance(error, AHNError | NotImplementedError):
        return {"status": "unsupported", "why": text}
    details = "".join(traceback.format_exception(error))
    return {"status": "failed", "why": f"{type(error).__name__}: {text}", "traceback": details}


def _described(method: Method) -> Row:
    fields = [field.name for field in dataclasses.fields(AHNConfig)]
    config: Row = {name: getattr(method.config, name, None) for name in fields}
    config["full_attention_layers"] = list(config["full_attention_layers"] or ())
    return {"method": method.name, "adapter": method.adapter, **config}
