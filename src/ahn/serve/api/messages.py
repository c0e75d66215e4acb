"""What was said in sessions and responses, so that no client sends it again; in SQLite, so that no crash tears it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.errors import AHNError

if TYPE_CHECKING:
    from ahn.cache.conversation import Message

FILE = "messages.sqlite"
TABLES = """
CREATE TABLE IF NOT EXISTS turns (
    owner TEXT NOT NULL, id TEXT NOT NULL, parent TEXT, root TEXT NOT NULL, said TEXT NOT NULL, shown TEXT,
    bytes INTEGER NOT NULL, used REAL NOT NULL, gone INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (owner, id));
CREATE INDEX IF NOT EXISTS turns_of_parent ON turns (owner, parent);
CREATE INDEX IF NOT EXISTS turns_by_use ON turns (used);
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL, name TEXT NOT NULL, head TEXT NOT NULL, PRIMARY KEY (owner, name));
"""
"""A turn holds only what was new in it; `parent` is the turn it goes on from, `root` the first one of all."""


class StorageError(AHNError):
    """A turn cannot be kept."""


class MessageStore:
    """Turns of conversations, each with the one it goes on from. Several servers may share a directory.

    Args:
        directory: where the file is; None keeps all in memory.
        limit: bytes of messages. Beyond it, whole conversations go, the least recently used first.
        age: seconds after whose last use a conversation goes; None keeps all.
    """

    def __init__(self, directory: Path | None, limit: int = 1 << 30, age: float | None = None) -> None:
        self.limit, self.age, self._lock = limit, age, threading.Lock()
        path = ":memory:" if directory is None else str(directory / FILE)
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(TABLES)
            self._version, self._bytes = self._one("PRAGMA data_version"), self._sum()
            with self._change():
                self._shrink("")
        except sqlite3.Error as error:
            raise AHNError(f"{path} cannot be used: {error}. Move it away to start with no conversations.") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def messages(self, owner: str, turn: str) -> list[Message] | None:
        """All that was said up to the end of a turn; None if there is no such turn, or it was deleted or is too old."""
        with self._lock:
            if not self._one(f"SELECT 1 {_THERE}", owner, turn, self._oldest):
                return None
            parts: list[list[Message]] = []
            at: str | None = turn
            step = "SELECT said, parent FROM turns WHERE owner=? AND id=?"
            while at is not None and (row := self._one(step, owner, at)):
                parts.append(json.loads(row[0]))
                at = row[1]
        return [message for part in reversed(parts) for message in part]

    def shown(self, owner: str, turn: str) -> dict[str, Any] | None:
        """What a client was given at the end of a turn."""
        with self._lock:
            row = self._one(f"SELECT shown {_THERE}", owner, turn, self._oldest)
        return json.loads(row[0]) if row and row[0] else None

    def head(self, owner: str, session: str) -> str | None:
        """The last turn of a session; None if there is no such session."""
        with self._lock:
            row = self._one(_HEAD, owner, session)
        return row[0] if row else None

    def add(
        self,
        owner: str,
        turn: str,
        said: Sequence[Message],
        parent: str | None = None,
        shown: dict[str, Any] | None = None,
        session: str | None = None,
    ) -> None:
        """Keep a finished turn; it is on the disk when this returns.

        Args:
            said: what is new in it, the reply included.
            parent: the turn it goes on from.
            shown: what the client was given.
            session: whose last turn it is from now on.

        Raises:
            StorageError: it cannot be written, for example because the disk is full.
        """
        row = (json.dumps(list(said)), None if shown is None else json.dumps(shown))
        size = len(row[0]) + len(row[1] or "")
        with self._change():
            found = (turn,) if parent is None else self._one(_ROOT, owner, parent)
            if found is None:
                raise StorageError("The conversation was deleted while this turn was written.")
            values = (owner, turn, parent, *found, *row, size, time.time())
            self._db.execute("INSERT OR REPLACE INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", values)
            self._db.execute("UPDATE turns SET used=? WHERE owner=? AND root=?", (values[7], owner, *found))
            self._bytes += size
            if session is not None:
                self._head(owner, session, turn, found[0])
            self._shrink(found[0])

    def delete(self, owner: str, turn: str) -> bool:
        """Forget a turn, and what nothing goes on from any more; returns whether there was one."""
        with self._change():
            changed = self._db.execute("UPDATE turns SET gone=1 WHERE owner=? AND id=? AND gone=0", (owner, turn))
            self._db.execute("DELETE FROM sessions WHERE owner=? AND head=?", (owner, turn))  # it begins anew
            self._prune(owner, turn)
            return changed.rowcount > 0

    def close_session(self, owner: str, session: str) -> bool:
        """Forget a session; returns whether there was one."""
        with self._change():
            row = self._one(_HEAD, owner, session)
            if row is not None:
                self._drop(owner, *self._one(_ROOT, owner, row[0]))
            return row is not None

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            before = self._bytes
            try:
                self._db.execute("BEGIN IMMEDIATE")
                if (version := self._one("PRAGMA data_version")) != self._version:  # another server has written
                    self._version, self._bytes = version, self._sum()
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                self._bytes = before
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise StorageError(f"The conversation cannot be kept: {error}.") from error
                raise

    def _head(self, owner: str, session: str, turn: str, root: str) -> None:
        """Make a turn the last one of a session; what the session was before goes, unless the turn goes on from it."""
        before = self._one(f"SELECT root FROM turns WHERE owner=? AND id=({_HEAD})", owner, owner, session)
        self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (owner, session, turn))
        if before is not None and before != (root,):
            self._drop(owner, *before)

    def _drop(self, owner: str, root: str) -> None:
        of_root = (owner, root)
        self._bytes -= self._one("SELECT COALESCE(SUM(bytes), 0) FROM turns WHERE owner=? AND root=?", *of_root)[0]
        heads = "SELECT id FROM turns WHERE owner=? AND root=?"
        self._db.execute(f"DELETE FROM sessions WHERE owner=? AND head IN ({heads})", (owner, *of_root))
        self._db.execute("DELETE FROM turns WHERE owner=? AND root=?", of_root)

    def _prune(self, owner: str, turn: str | None) -> None:
        """Delete a turn and those before it, as far as they are gone and nothing goes on from them."""
        while turn is not None:
            row = self._one("SELECT parent, bytes FROM turns WHERE owner=? AND id=? AND gone=1", owner, turn)
            if row is None or self._one("SELECT 1 FROM turns WHERE owner=? AND parent=?", owner, turn):
                return
            self._db.execute("DELETE FROM turns WHERE owner=? AND id=?", (owner, turn))
            self._bytes -= row[1]
            turn = row[0]

    @property
    def _oldest(self) -> float:
        """Last use of what is not too old."""
        return -1.0 if self.age is None else time.time() - self.age

    def _shrink(self, keep: str) -> None:
        """Down to the limits, conversation by conversation, the least recently used first; never the one of `keep`."""
        first = "SELECT owner, root, used FROM turns WHERE root != ? ORDER BY used LIMIT 1"
        while (found := self._one(first, keep)) is not None and (self._bytes > self.limit or found[2] < self._oldest):
            self._drop(*found[:2])

    def _sum(self) -> int:
        total: int = self._one("SELECT COALESCE(SUM(bytes), 0) FROM turns")[0]
        return total

    def _one(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()


_THERE = "FROM turns WHERE owner=? AND id=? AND gone=0 AND used>=?"
_ROOT = "SELECT root FROM turns WHERE owner=? AND id=?"
_HEAD = "SELECT head FROM sessions WHERE owner=? AND name=?"
