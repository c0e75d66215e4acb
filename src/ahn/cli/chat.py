"""`ahn chat`: a conversation with one cache over all turns."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from ahn.cli.common import DeviceOption, DtypeOption, JsonOption, QuantizedOption, SinksOption, WindowOption
from ahn.cli.generate import (
    MemoryOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    read,
    write,
)
from ahn.cli.terminal import visible
from ahn.errors import AHNError

if TYPE_CHECKING:
    from ahn.cli.session import Session
    from ahn.cli.writing import Sampling

COMMANDS = """\
/reset      forget everything and start again
/save FILE  write the conversation's memory to a file
/load FILE  go on with a conversation that was saved
/stats      what window and memory hold
/quit       leave (so does the end of input)"""


def command(
    model: ModelOption = None,
    adapter: MemoryOption = None,
    max_new_tokens: NewTokensOption = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    window: WindowOption = None,
    sinks: SinksOption = None,
    quantized: QuantizedOption = None,
    system: SystemOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with a model; one line is one message.

    One cache lives over all turns: each turn reads only what is new, and
    what leaves the window goes into the memory, so a conversation can go on
    for ever at constant cost. Messages may also be piped in, a line each.
    With --json each reply is one line of JSON.

    In the conversation, /reset starts again, /save FILE and /load FILE keep
    and resume it, /stats says what the memory holds, /quit leaves. Ctrl-C
    stops a reply.

    \b
    Examples:
      ahn chat --model BASE --adapter AHN --system "Be brief."
      printf 'Hello\\nWho are you?\\n' | ahn chat --model MERGED
    """
    from ahn.cli.session import open_session
    from ahn.cli.turns import PlainTurns, TemplateTurns
    from ahn.cli.writing import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    session = open_session(model, adapter, window, sinks, quantized, device, dtype)
    turns: PlainTurns
    if session.tokenizer.chat_template:
        turns = TemplateTurns(session, system, tell)
    elif system is not None:
        raise AHNError("--system needs a chat template; this model has none.")
    else:
        turns = PlainTurns(session)
        tell("This model has no chat template: it continues your text instead of answering it.")
    if sys.stdin.isatty():
        config = session.cache.config
        coarse = f", {config.quantized:,} tokens at {config.tier_label}" if config.quantized else ""
        tell(f"{config.memory}, window {config.window:,}, sinks {config.sinks:,}{coarse}; /help lists the commands.")
    for line in _lines():
        if line == "/quit":
            break
        try:
            _answer(turns, line, sampling, as_json)
        except (AHNError, KeyboardInterrupt) as error:
            if not sys.stdin.isatty():
                raise
            tell(str(error) or "Stopped.")  # no reason to lose the conversation


def tell(text: str) -> None:
    """A line for the person, on standard error."""
    typer.echo(visible(text), err=True)


def _lines() -> Iterator[str]:
    """Lines from the keyboard, with editing and history where there is a readline, or from a pipe."""
    if not sys.stdin.isatty():
        try:
            for line in sys.stdin:
                yield line.strip()
        except UnicodeDecodeError as error:
            raise AHNError(f"Standard input is not UTF-8 text (byte {error.start} of what was read last).") from error
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it when it is imported)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            tell("\n/quit leaves, and so does Ctrl-D.")
            continue
        yield line.strip()


def _answer(turns: Any, line: str, sampling: Sampling, as_json: bool) -> None:
    if line.startswith("/"):
        _obey(line, turns)
    elif line:
        _reply(turns, line, sampling, as_json)


def _obey(line: str, turns: Any) -> None:
    from ahn.cache.conversation import AHNCache
    from ahn.cli.session import sentence

    verb, _, file = line.partition(" ")
    session: Session = turns.session
    if verb == "/reset":
        turns.reset()
        tell("Forgot everything.")
    elif verb == "/save" and file:
        session.save(file.strip())
        tell(f"Saved {file.strip()}: {sentence(session.memory())}")
    elif verb == "/load" and file:
        turns.reset(AHNCache.load(file.strip(), session.model))
        tell(f"Loaded {file.strip()}: {sentence(session.memory())}")
    elif verb == "/stats":
        tell(sentence(session.memory()) if session.seen else "Nothing read yet.")
    else:
        tell(COMMANDS if verb == "/help" else f"Unknown command {line!r}. There are\n{COMMANDS}")


def _reply(turns: Any, line: str, sampling: Sampling, as_json: bool) -> None:
    """Read a message and write the reply; Ctrl-C stops either, and the conversation goes on."""
    from ahn.cli.writing import Interrupt

    session: Session = turns.session
    interrupt = Interrupt()
    try:
        ids = turns.next_input(line)
    except (AHNError, KeyboardInterrupt):
        turns.abandon()
        raise
    with interrupt.watching() if sys.stdin.isatty() else contextlib.nullcontext():
        if not read(session, ids, interrupt):
            turns.abandon()
            tell("Stopped; what was read of the message stays in the memory. /reset starts again.")
            return
        said, seconds = write(session, sampling, show=not as_json, interrupt=interrupt)
    turns.close(said)
    if as_json:
        reply = {"reply": said, "finished": session.finished, "new_tokens": len(session.written)}
        typer.echo(json.dumps(reply | {"seconds": round(seconds, 3)} | session.memory(), ensure_ascii=False))
