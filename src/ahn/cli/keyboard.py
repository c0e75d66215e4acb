"""Messages from the keyboard: editing, several lines, paste, and a history that outlives the program.

Enter sends. Alt-Enter, or a backslash at the end of a line, begins another line; what is pasted may have many.
"""

import contextlib
import os
import sys
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

CONTINUED = "\\"


def history_file() -> Path:
    """Where messages are kept between sessions: in the user's state directory, as its operating system names it."""
    if sys.platform == "win32":
        state = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "ahn" / "chat-history"


class PrivateHistory(FileHistory):
    """A file that only its owner reads. Where it cannot be written (a full disk) the session goes on without it."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        file.chmod(0o600)
        super().__init__(str(file))

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):  # what was typed may not be UTF-8
            super().store_string(string)


def history() -> History:
    """The history file, or a history of this session alone where no file can be had."""
    try:
        return PrivateHistory(history_file())
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return InMemoryHistory()


def keyboard() -> PromptSession[str]:
    """Asks for messages at a terminal, on standard error where standard output is none.

    Its `prompt` raises EOFError for Ctrl-D on an empty line, and KeyboardInterrupt for Ctrl-C, which drops what was
    typed.
    """
    return PromptSession(
        history=history(),
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation=lambda width, number, wrapped: "." * (width - 1) + " ",
        output=create_output(always_prefer_tty=True),
    )


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith(CONTINUED):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
