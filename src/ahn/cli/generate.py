"""`ahn generate`: continue a text of any length."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ahn.cli import common
from ahn.cli.main import STOPPED
from ahn.cli.terminal import visible
from ahn.errors import AHNError, reason
from ahn.files import check_readable, expanded

if TYPE_CHECKING:
    from ahn.cli.session import Session
    from ahn.cli.writing import Interrupt, Sampling

NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0,
        help="0 takes the most probable token each time; above, tokens are drawn (default: the model's generation "
        "settings).",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Draw, among the tokens that make up this probability (default: the model's generation settings).",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the draws; where none are made it changes nothing.")]
LookupOption = Annotated[
    int,
    typer.Option(
        "--prompt-lookup",
        "--prompt-lookup-num-tokens",
        min=0,
        help="Guess so many tokens at once to be what followed the last words earlier in the text (5 to 10, say). The "
        "text is the same; it comes faster where it repeats what stands before. 0 for none.",
    ),
]
SystemOption = Annotated[str | None, typer.Option("--system", help="System message, for a model with a chat template.")]


def command(
    model: common.ModelOption = None,
    adapter: common.AdapterOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The text, or what follows the text of --file.")
    ] = None,
    file: Annotated[str | None, typer.Option("--file", help="File with the text; - is standard input.")] = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    prompt_lookup: LookupOption = 0,
    window: common.WindowOption = None,
    sinks: common.SinksOption = None,
    quantized: common.QuantizedOption = None,
    system: SystemOption = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Continue the bare text even if the model has a chat template.")
    ] = False,
    device: common.DeviceOption = None,
    dtype: common.DtypeOption = None,
    as_json: common.JsonOption = False,
) -> None:
    """Continue a text of any length.

    The text comes from --prompt, from --file or from standard input. It is
    read in chunks, so memory use does not grow with its length: what leaves
    the window goes into the memory. If the model has a chat template, the
    text is sent as a user's message. Only the continuation goes to standard
    output.

    \b
    Examples:
      ahn generate --prompt "def main():"
      ahn generate --model BASE --adapter AHN --file book.txt --prompt "Who did it?"
      cat notes.txt | ahn generate --max-new-tokens 100 --temperature 0.7
    """
    from ahn.cli.session import open_session, sentence, warn_beyond_training
    from ahn.cli.writing import Interrupt, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, prompt_lookup)
    text = _text(prompt, file)
    session = open_session(model, adapter, device, dtype, window=window, sinks=sinks, quantized=quantized)
    ids = _as_prompt(session, text, system, template=not no_chat_template)
    if warning := warn_beyond_training(session, len(ids) + max_new_tokens):
        typer.echo(f"Note: {warning}", err=True)
    start = time.perf_counter()
    read(session, ids)
    read_seconds = time.perf_counter() - start
    read_state = session.memory()
    if not as_json:
        typer.echo(f"Read {sentence(read_state)}; {len(ids) / read_seconds:,.0f} tokens/s", err=True)

    with Interrupt().watching() as interrupt:
        written, write_seconds = write(session, sampling, show=not as_json, interrupt=interrupt)
    if as_json:
        result = {"text": written, "new_tokens": len(session.written), "finished": session.finished}
        times = {"read_seconds": round(read_seconds, 3), "write_seconds": round(write_seconds, 3)}
        common.print_json(result | {"prompt": read_state} | times)
    else:
        speed = len(session.written) / write_seconds
        typer.echo(f"Wrote {len(session.written):,} tokens; {speed:,.1f} tokens/s", err=True)
    if session.interrupted:
        raise typer.Exit(STOPPED)


def read(session: Session, ids: list[int], interrupt: Interrupt | None = None) -> int:
    """Read with a progress bar on standard error; returns how many tokens were read: all, unless interrupted."""
    with common.progress() as bar:
        task = bar.add_task("reading", total=len(ids))
        return session.read(ids, lambda tokens: bar.advance(task, tokens), interrupt)


def write(
    session: Session, sampling: Sampling, show: bool, interrupt: Interrupt, markdown: bool = False
) -> tuple[str, float]:
    """Continue, piece by piece on standard output if it is to `show`; returns the text and seconds.

    Args:
        markdown: what is written is Markdown, which a terminal shows as such.
    """

    def say(text: str) -> None:
        if show:
            sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()

    start = time.perf_counter()
    if markdown and common.out.is_terminal and not common.out.is_dumb_terminal:
        from ahn.cli.markdown import MarkdownReply

        with MarkdownReply(common.out) as reply:
            return session.write(sampling, reply, interrupt), time.perf_counter() - start
    text = session.write(sampling, say, interrupt)
    seconds = time.perf_counter() - start
    say("\n")
    return text, seconds


def read_text(path: Path | None) -> str:
    """The text of a file, or of standard input."""
    try:
        if path is not None:
            check_readable(expanded(path), or_pipe=True)
        raw = sys.stdin.buffer.read() if path is None else expanded(path).read_bytes()
        return raw.decode("utf-8")
    except AHNError:
        raise
    except UnicodeDecodeError as error:
        raise AHNError(f"{path or 'Standard input'} is not UTF-8 text (byte {error.start}).") from error
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a name with a zero byte
        raise AHNError(f"Cannot read {path or 'standard input'}: {reason(error)}.") from error


def _text(prompt: str | None, file: str | None) -> str:
    """The text that the options name."""
    if file is None and prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt or --file, or pipe a text in")
    if file is None and prompt is not None:
        return prompt
    text = read_text(None if file in (None, "-") else Path(str(file)))
    return text if prompt is None else f"{text.rstrip()}\n\n{prompt}"


def _as_prompt(session: Session, text: str, system: str | None, template: bool) -> list[int]:
    """Token ids of the text, as a user's message if the model takes messages."""
    if not template or not session.tokenizer.chat_template:
        if system is not None:
            raise AHNError("--system needs a chat template; this model has none, or --no-chat-template is given.")
        return session.encode(text, start=True)
    from ahn.measure.parts import render

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    return session.encode(render(session.tokenizer, messages, ask=True), start=False)
