"""The `ahn` program: its verbs, and what its exit codes mean.

Exit codes: 0 done, 1 something the user can fix (`AHNError`, one line on stderr), 2 wrong usage, 130 interrupted.
"""

import contextlib
import importlib
import itertools
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, Literal

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from ahn.cli.groups import GroupedCommand
from ahn.cli.terminal import visible
from ahn.errors import AHNError, installed_version, is_out_of_memory
from ahn.files import expanded
from ahn.measure.tokens import ABANDONED

VERBS = {
    "demo": "See a memory work: real text far beyond the window, on this machine.",
    "generate": "Continue a text of any length: a prompt, a file or standard input.",
    "chat": "Talk with a model; one cache over all turns, however long it gets.",
    "serve": "Serve a model with OpenAI's API: many long conversations at once, and a page.",
    "train": "Distil a memory onto a model, on one machine or many.",
    "info": "Shapes, memory parameters, cache and FLOPs of any model; no weights needed.",
    "merge": "Put a base model and an adapter into one checkpoint.",
    "split": "Take a merged checkpoint apart: base model and adapter.",
    "eval": "Benchmarks: run tasks with a model, compare results.",
    "inspect": "Look into a memory: what it writes of a text, and what its reads give.",
    "bench": "Speed and memory, side by side, against what the machine can do.",
    "env": "Versions and devices: what a bug report needs.",
}
"""A verb and its line in `ahn --help`. The module `ahn.cli.VERB` holds it, as a function `command`, or as a Typer
`app` if it has verbs of its own."""


NO_MEMORY = (
    "The device has not enough memory for this. Ask for less at once (--batch, --length, --window, as far as the verb "
    "has them), for --dtype bfloat16, or for another --device."
)
STOPPED = 130
"""Exit status of a program that Ctrl-C ended."""
IMPORT = "<frozen importlib._bootstrap>"
"""Where Python's frames are while it imports a module."""
GOES_ON = {
    "train": " With --resume_from_checkpoint true the same command goes on from the last checkpoint, if there is one.",
    "eval": " What is finished is kept: the same command goes on from there.",
    "bench": " Rows that were measured are kept; `ahn bench report` shows them.",
}
"""What is said after Ctrl-C, by verb."""
TEXTS = ("--prompt", "--system")
"""Options whose value may be empty."""
VERBATIM = (*TEXTS, "--api-key")
"""Options whose value is no path, whatever it begins with."""
NARROW = 100
"""Columns that the boxes of help need to show every option with its whole name."""


class LazyGroup(TyperGroup):
    """Knows the verbs by name and imports the one that is run: `ahn --help` must not wait for torch."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=line, short_help=line) for name, line in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, placeholder, rest = super().resolve_command(ctx, args)
        _check_values(rest, ctx)
        return name, placeholder and load(str(name)), list(_at_home(rest))


def _check_values(words: list[str], ctx: Any) -> None:
    """Raises BadParameter for an option with an empty value, as an unset variable gives: it is not the default."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in itertools.pairwise(words):
        if not value and option.startswith("--") and option not in TEXTS:
            raise typer.BadParameter(f"{option} is empty", ctx=ctx)


def _at_home(words: list[str]) -> Iterator[str]:
    """The words with `~` and `~user` written out, as a shell does, but also in quotes and behind `--option=`.

    Every value of ours that begins so is a path; else `--out=~/x` would make a folder of the name `~`.
    """
    for before, word in itertools.pairwise(["", *words]):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        home = value.startswith("~") and option not in VERBATIM
        yield word.removesuffix(value) + str(expanded(value)) if home else word


def load(verb: str) -> Any:
    module = importlib.import_module(f"ahn.cli.{verb}")
    if hasattr(module, "app"):
        module.app.rich_markup_mode = _markup()
        command = typer.main.get_command(module.app)
        for inner in getattr(command, "commands", {}).values():
            inner.short_help = " ".join(inner.help.partition("\n\n")[0].split())  # else it is cut to the line
        return command
    single = typer.Typer(add_completion=False, rich_markup_mode=_markup())
    single.command(verb, cls=GroupedCommand)(module.command)
    return typer.main.get_command(single)


def _markup() -> Literal["rich"] | None:
    """Help without boxes on a terminal too narrow for them: they would cut the names of options."""
    return "rich" if shutil.get_terminal_size().columns >= NARROW else None


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ahn {installed_version('ahn') or 'unknown'}")
        raise typer.Exit


@app.callback()
def ahn(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Artificial Hippocampus Networks: long context for open LLMs at constant cost."""


def main() -> None:
    # Read by OpenMP when torch is imported. Its threads otherwise spin while they wait for each other, which on a
    # machine that has other work to do slows small models tenfold and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        _open_streams()
        app.rich_markup_mode = _markup()
        try:
            with _stopping():
                app(prog_name="ahn")
        finally:
            sys.stdout.flush()  # a full disk shows here, and not after the exit code is chosen
    except BrokenPipeError:  # who read the output has enough
        _drop_output()
        sys.exit(1)
    except (AHNError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError):
            _drop_output()
            told = ": ".join(filter(None, (error.filename and str(error.filename), error.strerror))) or told
        print("ahn:", visible(" ".join(told.split())), file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"ahn: {NO_MEMORY}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == STOPPED:
            _say_stopped()
        _leave(end.code)
        raise


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Ctrl-C is `_stop` inside the block; only a process's main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: KeyboardInterrupt as ever, but amid an import the end. Libraries swallow it there, and fail later."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            _say_stopped()
            os._exit(STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _say_stopped() -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first
        with contextlib.suppress(OSError):
            print(f"ahn: Stopped.{GOES_ON.get(next(iter(sys.argv[1:]), ''), '')}", file=sys.stderr, flush=True)


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as a line, without the place in the source that it comes from."""
    with contextlib.suppress(OSError):
        print("ahn:", visible(" ".join(str(message).split())), file=sys.stderr)


def _open_streams() -> None:
    """Stand-ins for streams that the caller closed.

    Raises:
        AHNError: it is standard output: the results would be lost.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the program runs)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise AHNError("Standard output is closed.")


def _drop_output() -> None:
    """Forget output that cannot be written, which Python would try again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())


def _leave(code: object) -> None:
    """End at once after Ctrl-C, or where it left work behind that cannot be stopped.

    Python would first wait for that work, and take apart for seconds what was imported.
    """
    if code == STOPPED or any(thread.name == ABANDONED for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
