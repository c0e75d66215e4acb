"""`ahn chat`: a conversation with one cache over all turns."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from ahn.cli import common, generate
from ahn.cli.common import tell
from ahn.errors import AHNError

if TYPE_CHECKING:
    from ahn.cli.commands import Commands
    from ahn.cli.session import Session
    from ahn.cli.writing import Interrupt, Sampling


def command(
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    max_new_tokens: generate.NewTokensOption = 512,
    temperature: generate.TemperatureOption = None,
    top_p: generate.TopPOption = None,
    seed: generate.SeedOption = 0,
    prompt_lookup: generate.LookupOption = 0,
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    quantized: common.QuantizedOption = None,
    system: generate.SystemOption = None,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Talk with a model, about texts of any length.

    One cache lives over all turns: each turn reads only what is new, and
    what leaves the window goes into the memory, so a conversation can go on
    for ever at constant cost. Messages may also be piped in, a line each.
    With --json each reply is one line of JSON.

    In the conversation, /read FILE reads a text that the next question is
    about, /memory says what is kept of it, /save and /load keep and resume
    the conversation, /help lists all commands. Ctrl-C stops a reply, Ctrl-D
    leaves.

    \b
    Examples:
      ahn chat --model smollm2
      ahn chat --model BASE --adapter AHN --system "Be brief."
      printf 'Hello\\nWho are you?\\n' | ahn chat --model MERGED
    """
    from ahn.cli.commands import Commands
    from ahn.cli.session import open_session
    from ahn.cli.turns import PlainTurns, TemplateTurns
    from ahn.cli.writing import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, prompt_lookup)
    session = open_session(model, adapter, device, dtype, window=window, sinks=sinks, quantized=quantized)
    turns: PlainTurns
    if session.tokenizer.chat_template:
        turns = TemplateTurns(session, system, tell)
    elif system is not None:
        raise AHNError("--system needs a chat template; this model has none.")
    else:
        turns = PlainTurns(session)
        tell("This model has no chat template: it continues your text instead of answering it.")
    if not Chat(Commands(turns), sampling, as_json).run():
        raise typer.Exit(1)


class Chat:
    """Messages, replies and commands until there are no more."""

    def __init__(self, commands: Commands, sampling: Sampling, as_json: bool) -> None:
        self.commands, self.sampling, self.as_json = commands, sampling, as_json
        self.typed = sys.stdin.isatty()

    @property
    def session(self) -> Session:
        return self.commands.session

    def run(self) -> bool:
        """Returns whether all that was piped in could be done; a person has seen it."""
        done = True
        for line in self._typed() if self.typed else _piped():
            try:
                message = line.decode() if isinstance(line, bytes) else line
                if message.strip() == "/quit":
                    break
                self._answer(message.strip())
            except UnicodeDecodeError as error:
                done = False
                tell(f"ahn: Standard input is not UTF-8 text (byte {error.start} of a line); the line is left out.")
            except AHNError as error:  # no reason to lose the conversation
                done = False
                tell(" ".join(str(error).split()) if self.typed else f"ahn: {' '.join(str(error).split())}")
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                tell("Stopped.")
        return done or self.typed

    def _typed(self) -> Iterator[str]:
        from ahn.cli.keyboard import keyboard

        terminal = keyboard()
        # From here on there is a conversation to lose: Ctrl-C amid an import must not end the program (`ahn.cli.main`).
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.commands.obey("/window", _interrupt())
        tell("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.")
        while True:
            try:
                yield terminal.prompt(self.commands.prompt)
            except EOFError:
                return
            except KeyboardInterrupt:
                tell("Ctrl-D leaves.")

    def _answer(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self.commands.obey(line, _interrupt())
        elif line:
            self._reply(line.removeprefix("/") if line.startswith("//") else line)

    def _reply(self, message: str) -> None:
        """Read a message and write the reply; Ctrl-C stops either, and the conversation goes on."""
        turns, interrupt = self.commands.turns, _interrupt()
        try:
            ids = turns.next_input(message)
        except (AHNError, KeyboardInterrupt):
            turns.abandon()
            raise
        with interrupt.watching(insist=not self.typed):  # a forward that ends halfway would end the conversation
            if generate.read(self.session, ids, interrupt) < len(ids):
                turns.abandon()
                self._leave_unless_typed()
                tell("Stopped; what was read of the message stays in the memory. /reset starts again.")
                return
            markdown = self.typed and bool(self.session.tokenizer.chat_template)  # else it is text that goes on
            show = not self.as_json
            said, seconds = generate.write(self.session, self.sampling, show, interrupt, markdown and show)
            turns.close(said)
        self._account(said, seconds)
        if self.session.interrupted:
            self._leave_unless_typed()

    def _leave_unless_typed(self) -> None:
        """Ctrl-C among messages that were piped in means all of them; a person stops one reply by it."""
        if not self.typed:
            raise KeyboardInterrupt

    def _account(self, said: str, seconds: float) -> None:
        session = self.session
        new = len(session.written)
        if self.as_json:
            reply = {"reply": said, "finished": session.finished, "new_tokens": new, "seconds": round(seconds, 3)}
            typer.echo(json.dumps(reply | session.memory(), ensure_ascii=False))
        elif self.typed:
            how = "stopped, " if session.interrupted else "" if session.finished else "cut off by --max-new-tokens, "
            speed = f"{new / seconds:,.1f} tokens/s" if seconds else ""
            common.err.print(f"[{how}{new:,} tokens, {speed}; {session.seen:,} in the conversation]", style="dim")


def _interrupt() -> Interrupt:
    from ahn.cli.writing import Interrupt

    return Interrupt()


def _piped() -> Iterator[bytes]:
    """Lines of standard input where it is no terminal."""
    yield from sys.stdin.buffer
