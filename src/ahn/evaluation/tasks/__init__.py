"""Every task by name. A benchmark is one module with two functions and a line in `BENCHMARKS`.

names() -> Sequence[str]                                       its tasks, such as "longbench/qmsum"
tasks(parts: Sequence[str], options: Options) -> list[Task]    those that "longbench" + "/".join(parts) stands for
LENGTH: re.Pattern                                             where it is generated: any length a name may end with
"""

import importlib
from collections.abc import Sequence
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.task import Options, Task

BENCHMARKS = {
    "lveval": "ahn.evaluation.tasks.lveval",
    "infinitebench": "ahn.evaluation.tasks.infinitebench",
    "longbench": "ahn.evaluation.tasks.longbench",
    "ruler": "ahn.evaluation.tasks.ruler",
    "needle": "ahn.evaluation.tasks.needle",
    "recall": "ahn.evaluation.tasks.recall",
}
"""First part of a task's name -> module."""
OF_QUESTIONS, OF_GENERATED = {"data_dir", "protocol_dir", "max_length"}, {"haystack", "lengths", "samples", "seed"}
USES = dict.fromkeys(("lveval", "infinitebench", "longbench"), OF_QUESTIONS) | {
    "ruler": OF_GENERATED | {"data_dir"}, "needle": OF_GENERATED | {"depths"}, "recall": OF_GENERATED,
}  # fmt: skip
"""First part of a task's name -> fields of `Options` that change such a task; `profile` is noted with every result."""


def tasks(spec: str, **options: Any) -> list[Task]:
    """The tasks that a name stands for: a whole benchmark, a task, or one length of it.

    Args:
        spec: such as "lveval", "lveval/hotpotwikiqa_mixup", "lveval/hotpotwikiqa_mixup/32k" or "needle".
    """
    module, parts = _module(spec)
    found: list[Task] = module.tasks(parts, Options(**options))
    return found


def check(spec: str) -> None:
    """Whether there is such a task: what can be known before a model is loaded."""
    module, parts = _module(spec)
    if parts and hasattr(module, "LENGTH") and module.LENGTH.fullmatch(parts[-1]):
        parts = parts[:-1]
    # "lveval/128k" leaves out the task between benchmark and length
    if not any(set(parts) <= set(name.split("/")[1:]) for name in module.names()):
        raise AHNError(f"There is no task {spec!r}; `ahn eval list` names all there are.")


def without_use(specs: Sequence[str]) -> set[str]:
    """The fields of `Options` that change none of these tasks, each of which `check` has let pass."""
    used = set[str]()
    for module, parts in map(_module, specs):
        (benchmark,) = (name for name, path in BENCHMARKS.items() if path == module.__name__)
        named = bool(parts) and hasattr(module, "LENGTH") and bool(module.LENGTH.fullmatch(parts[-1]))
        used |= USES[benchmark] - ({"lengths"} if named else set())
    return (OF_QUESTIONS | OF_GENERATED | {"depths"}) - used


def names() -> list[str]:
    """Every task's name."""
    return [name for module in BENCHMARKS.values() for name in importlib.import_module(module).names()]


def _module(spec: str) -> tuple[Any, list[str]]:
    benchmark, *parts = spec.strip("/").split("/")
    if benchmark not in BENCHMARKS:
        raise AHNError(f"There is no benchmark {benchmark!r}; choose one of {', '.join(BENCHMARKS)}.")
    return importlib.import_module(BENCHMARKS[benchmark]), parts


def pick(parts: Sequence[str], known: tuple[str, ...], benchmark: str) -> tuple[str, ...]:
    """The task that is the only part of a name, or every known one where there is no part."""
    if not parts:
        return known
    if len(parts) > 1 or parts[0] not in known:
        raise AHNError(f"{benchmark} has no task {'/'.join(parts)!r}; choose one of {', '.join(known)}.")
    return (parts[0],)
