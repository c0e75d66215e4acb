"""The public API: every name with its signature, its types for a user's type checker, and what an import costs."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ahn

MODULES = ("inspect", "memory", "ops", "smollm2", "tiny", "training")
METHODS = {
    "AHNCache": (
        "for_model",
        "reset",
        "activate_past_recording",
        "crop",
        "to",
        "nbytes",
        "bytes_by_part",
        "save",
        "load",
    ),
    "AHNConfig": ("replace",),
}
# One line for each name. A line that changes there changes what users call: the changelog must say so.
SNAPSHOT = Path(__file__).with_name("public_api.txt")


def _signature(function: Any) -> str:
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))


def _line(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"class {name}"
    elif callable(value):
        yield name + _signature(value)
    else:
        yield name


def api() -> Iterator[str]:
    """One line for each public name, functions with their signatures."""
    yield "ahn.AHNConfig" + _signature(ahn.AHNConfig)
    for name in ahn.__all__:
        yield from _line(f"ahn.{name}", getattr(ahn, name))
        for method in METHODS.get(name, ()):
            yield from _line(f"ahn.{name}.{method}", getattr(getattr(ahn, name), method))
    for module in MODULES:
        for name in getattr(ahn, module).__all__:
            yield from _line(f"ahn.{module}.{name}", getattr(getattr(ahn, module), name))


def test_names_and_signatures_are_what_they_were() -> None:
    assert list(api()) == SNAPSHOT.read_text().splitlines()


def test_every_public_thing_says_what_it_is() -> None:
    things = {f"ahn.{name}": getattr(ahn, name) for name in ahn.__all__}
    for module in MODULES:
        found = importlib.import_module(f"ahn.{module}")
        things |= {f"ahn.{module}.{name}": getattr(found, name) for name in found.__all__}
    things = {name: thing for name, thing in things.items() if callable(thing)}
    assert [name for name, thing in things.items() if not inspect.getdoc(thing)] == []


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_loads_little_and_reaches_every_name() -> None:
    """Neither torch nor transformers, until a name is used. And transformers, which makes itself anew when its
    processors are imported, has our class then too (tests/checkpoint/test_auto.py has more orders of imports).
    """
    code = (
        "import sys, ahn, ahn.cli; dir(ahn); print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
        f"for name in [*{MODULES}, *ahn.__all__]: getattr(ahn, name)\nprint('all')\n"
        "import transformers.processing_utils, transformers.models.auto.modeling_auto\n"
        "print(transformers.AHNForCausalLM.__module__)"
    )
    assert _python(code).split() == ["[]", "all", "ahn.auto.classes"]
    assert {*ahn.__all__, *MODULES} <= {*dir(ahn)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    importlib.import_module("ahn.inspect")  # which imports rooms that are not public
    for name in ("frobnicate", "plots", "observer", "distill"):
        with pytest.raises(AttributeError, match=f"module 'ahn' has no attribute '{name}'"):
            getattr(ahn, name)


# Libraries are left out of the check, which would take a minute: `make test` checks our source with torch's types.
_CONFIG = """
[mypy]
strict = True
follow_imports = silent
[mypy-transformers.*,torch.*,triton.*,matplotlib.*,numpy.*,huggingface_hub.*,safetensors.*,rich.*,typer.*]
follow_imports = skip
"""
_USER = """
from pathlib import Path
import ahn

config: ahn.AHNConfig = ahn.AHNConfig(window=512).replace(sinks=4)
cache: type[ahn.AHNCache] = ahn.AHNCache
numbers: int = ahn.count_parameters(None, config) + ahn.cost(None, config, 1000).ahn.cache_bytes
out: Path = ahn.merge("base", "adapter", "out")
names: tuple[str, ...] = ahn.memory.names()
tiny: Path = ahn.tiny.path()
window: ahn.training.WindowSchedule
"""
_WRONG = """
ahn.frobnicate
ahn.plots
ahn.AHNConfig(windows=3)
ahn.merge("base", "adapter")
a: str = ahn.memory.names()
b: str = ahn.count_parameters(None, config)
c: str = ahn.AHNCache.nbytes
"""


def test_a_users_file_is_checked_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(_CONFIG)
    every = "".join(f"ahn.{name}\n" for name in [*ahn.__all__, *MODULES])
    (tmp_path / "user.py").write_text(_USER + every + _WRONG)
    first = (_USER + every).count("\n") + 2
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=/dev/null", "user.py"]
    environment = {**os.environ, "MYPYPATH": str(Path(ahn.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    wrong = [int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("user.py:")]
    assert wrong == list(range(first, first + 7)), done.stdout
