"""Commands of `ahn chat`: lines that begin with a slash."""

import contextlib
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ahn.cache.conversation import AHNCache
from ahn.cache.file import describe
from ahn.cli import common
from ahn.cli.common import tell
from ahn.cli.generate import read, read_text
from ahn.cli.session import Session, sentence
from ahn.cli.terminal import visible
from ahn.cli.turns import PlainTurns
from ahn.cli.writing import Interrupt
from ahn.errors import AHNError, reason
from ahn.files import expanded

HELP = """\
/read FILE    read a text; what you say next is about it
/memory       what is exact, at a few bits, remembered, and what full attention would take
/window       how far the model sees exactly
/save FILE    write the conversation to a file
/load FILE    go on with a conversation that was saved
/fork NAME    go on in a copy of this conversation; the one you leave stays as it is
/switch NAME  go back to a conversation that was forked
/reset        forget everything and start again
/help         this list
/quit         leave (so does Ctrl-D)
//TEXT        send a text that begins with a slash
Enter sends; Alt-Enter, or a backslash at the end, begins another line. Ctrl-C stops a reply and keeps what was said."""

SHOWN_TURNS = 4
"""Messages that are shown of a conversation that was loaded."""
SHOWN_LENGTH = 400
"""Characters of each that are shown."""
FIRST = "main"
"""Name of the conversation that one begins with."""


class Commands:
    """What can be done with a conversation besides talking.

    Attributes:
        turns: the conversation that one is in.
        name: what it is called.
    """

    def __init__(self, turns: PlainTurns) -> None:
        self.turns, self.name = turns, FIRST
        self._others: dict[str, PlainTurns] = {}
        self._known: dict[str, Callable[[str, Interrupt], None]] = {
            "/read": self._read,
            "/memory": self._memory,
            "/window": self._window,
            "/save": self._save,
            "/load": self._load,
            "/fork": self._fork,
            "/switch": self._switch,
            "/reset": self._reset,
            "/help": lambda rest, interrupt: tell(HELP),
        }

    @property
    def session(self) -> Session:
        return self.turns.session

    @property
    def prompt(self) -> str:
        """What to ask with: the conversation's name once there are several."""
        return f"{self.name}> " if self._others else "> "

    def obey(self, line: str, interrupt: Interrupt) -> None:
        """Carry out a line that begins with a slash.

        Raises:
            AHNError: it cannot be done; the conversation is as it was.
        """
        verb, _, rest = line.partition(" ")
        if verb not in self._known:
            raise AHNError(f"Unknown command {verb}; /help lists them, and //{line[1:]} sends it as a text.")
        self._known[verb](rest.strip(), interrupt)

    def _read(self, rest: str, interrupt: Interrupt) -> None:
        path = _file(rest, "/read FILE")
        if path.exists() and not path.is_file():
            raise AHNError(f"{path} is not a file.")
        text = read_text(path).removeprefix("\ufeff").strip()
        if not text:
            raise AHNError(f"{path} is empty.")
        before = self.turns.begin()
        ids = self.session.encode(text, start=not before and self.session.seen == 0)
        start = time.perf_counter()
        with interrupt.watching(insist=False):
            if before:
                self.session.read(before)
            done = read(self.session, ids, interrupt)
        seconds = time.perf_counter() - start
        speed = f"{done:,} tokens in {seconds:,.1f} s ({done / seconds:,.0f} tokens/s)"
        if done < len(ids):
            self.turns.opened(f"[{path.name}, the first {done:,} of {len(ids):,} tokens]")
            if not done:
                tell(f"Stopped before anything of {path.name} was read.")
                return
            tell(f"Stopped: {path.name} is read up to {done / len(ids):.0%}, {speed}. What you say next is about that.")
        else:
            self.turns.opened(f"[{path.name}, {done:,} tokens]")
            tell(f"Read {path.name}: {speed}. What you say next is about it.")

    def _memory(self, rest: str, interrupt: Interrupt) -> None:
        if not self.session.seen:
            raise AHNError("Nothing was read yet.")
        common.print_pairs(memory_rows(self.session), common.err)

    def _window(self, rest: str, interrupt: Interrupt) -> None:
        config = self.session.cache.config
        if rest:
            raise AHNError(
                f"A conversation keeps the window that it began with ({config.window:,}); leave, and begin another "
                f"with ahn chat --window {rest if rest.isdecimal() else 'N'}."
            )
        coarse = f", {config.quantized:,} tokens before it at {config.tier_label}" if config.quantized else ""
        tell(f"Window {config.window:,}, sinks {config.sinks:,}{coarse}; memory {config.memory}.")

    def _save(self, rest: str, interrupt: Interrupt) -> None:
        path = _file(rest, "/save FILE")
        _check_replaceable(path)
        with interrupt.watching(insist=False):  # the last token is read before the file is written
            self.session.save(str(path))
        tell(f"Saved {path}: {sentence(self.session.memory())}")

    def _load(self, rest: str, interrupt: Interrupt) -> None:
        path = _file(rest, "/load FILE")
        self.turns.reset(AHNCache.load(path, self.session.model))
        tell(f"Loaded {path}: {sentence(self.session.memory())}")
        self._show_last()

    def _fork(self, rest: str, interrupt: Interrupt) -> None:
        name = _given(rest, "/fork NAME")
        if name == self.name or name in self._others:
            raise AHNError(f"There is a conversation {name} already; /switch {name} goes there.")
        self._enter(name, self.turns.copy())
        tell(f"This is {name}, a copy. /switch {next(reversed(self._others))} goes back to what you left.")

    def _switch(self, rest: str, interrupt: Interrupt) -> None:
        name = _given(rest, "/switch NAME")
        if name not in self._others:
            raise AHNError(f"There is no other conversation {name}; there are: {', '.join(self._others) or 'none'}.")
        self._enter(name, self._others.pop(name))
        tell(f"This is {name}: {sentence(self.session.memory())}")
        self._show_last()

    def _enter(self, name: str, turns: PlainTurns) -> None:
        self._others[self.name] = self.turns
        self.turns, self.name = turns, name

    def _reset(self, rest: str, interrupt: Interrupt) -> None:
        self.turns.reset()
        tell("Forgot everything.")

    def _show_last(self) -> None:
        """What was said last, cut to a few lines."""
        for message in self.turns.messages[-SHOWN_TURNS:]:
            said = message["content"]
            cut = said if len(said) <= SHOWN_LENGTH else f"{said[:SHOWN_LENGTH]}…"
            tell(f"{'> ' if message['role'] == 'user' else ''}{cut}", style="dim")


def _file(rest: str, usage: str) -> Path:
    """The file that is named, if the system can have one of that name."""
    given = _given(rest, usage)
    path = Path(given)
    try:
        path = expanded(given)
        if not os.path.lexists(path):
            path = expanded(_unquoted(given))
        path.lstat()
    except FileNotFoundError:
        pass
    except AHNError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, ~nobody, a zero byte
        raise AHNError(f"{visible(str(path))}: {reason(error)}.") from error
    return path


def _unquoted(name: str) -> str:
    """A name without the quotes and backslashes that a shell wants; a blank or an apostrophe may stand as it is."""
    try:
        words = shlex.split(name)
    except ValueError:  # a quote that nothing closes
        return name
    return words[0] if len(words) == 1 else name


def _check_replaceable(path: Path) -> None:
    """Raises AHNError if a file holds something else than a conversation: a text, say, that was to be read."""
    if path.is_file() and path.stat().st_size:
        try:
            describe(path)
        except AHNError:
            raise AHNError(f"{path} is there already and is no conversation: choose another name.") from None


def _given(rest: str, usage: str) -> str:
    if not rest:
        raise AHNError(f"{usage.split()[1]} is missing: {usage}.")
    return rest


def memory_rows(session: Session) -> list[tuple[str, str]]:
    """What each part of a conversation holds, in tokens and bytes, beside what full attention would."""
    memory, sizes = session.memory(), session.cache.bytes_by_part()
    exact = memory["tokens_seen"] - memory["tokens_quantized"] - memory["tokens_in_memory"]
    rows = [("exact", _row(exact, sizes["exact"]))]
    if memory["quantized"]:
        rows.append((f"at {memory['bits']}", _row(memory["tokens_quantized"], sizes["quantized"])))
    rows.append((f"remembered ({memory['memory']})", _row(memory["tokens_in_memory"], sizes["memory"])))
    rows.append(("in all", _row(memory["tokens_seen"], memory["cache_bytes"])))
    with contextlib.suppress(AHNError):  # layers that no formula covers
        rows.append(("full attention", _row(memory["tokens_seen"], full_bytes(session))))
    return rows


def full_bytes(session: Session) -> int:
    """What the keys and values of all tokens would take, in the model's dtype."""
    from ahn.costs import cost

    model: Any = session.model
    return cost(model.config, session.cache.config, session.seen, model.dtype).full.kv_bytes


def _row(tokens: int, size: int) -> str:
    return f"{tokens:>12,} tokens  {size / 2**20:>10,.2f} MiB"
