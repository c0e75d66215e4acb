"""Files: written whole or not at all, and read as if they could hold anything.

Whatever this package writes lies in a hidden directory (`.NAME.XXXXXXXX.ahn.partial`) until it is complete and on the
disk, and then takes its place in one step. A run that was killed leaves such a directory behind; the next write beside
it removes it. Whoever writes holds a lock on it, which ends with the process however that ends, so what another
process is writing stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.errors import AHNError, reason

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing is ever taken for a left-over
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON = 1 << 28
"""Bytes of the largest JSON file that is read; the index of a model with a million tensors has fewer."""
_ADDRESS = re.compile("(https?|ftp|s3|gs|hf):/")
"""Of what lies elsewhere; a Path has one slash of the two."""
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.ahn\.partial", re.DOTALL)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~user` written out.

    Raises:
        AHNError: the system knows no such user, or it is the address of something elsewhere.
    """
    if _ADDRESS.match(os.fspath(path)):
        address = os.fspath(path).replace(":/", "://").replace(":///", "://")
        raise AHNError(
            f"{address} is an address, and nothing is read from there: download it and name the file or "
            "folder, or give a Hub id such as Qwen/Qwen2.5-3B-Instruct where one is taken."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise AHNError(f"{os.fspath(path)} cannot be found: there is no such user.") from error


def check_folder(folder: Path) -> None:
    """Find out by trying, before the work, whether files can be written to a folder, there already or not.

    Nothing is left behind.

    Raises:
        AHNError: it is a file, or its disk is full or can only be read.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise AHNError(f"{folder} is a file: choose another output.")
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise AHNError(f"{folder} cannot be written: {reason(error)}.") from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to; what is there when the block ends well becomes `file`, in one step.

    When the block does not end well, `file` is as it was. The new file has the permissions that the user's umask gives.

    Raises:
        AHNError: writing fails, for example because the disk is full, or a directory or a device has this name.
    """
    with _reporting(file):
        if file.exists() and not file.is_file():  # a device would be replaced by a file, for every program
            raise AHNError(f"{file} is not a file: choose another name.")
    with _reporting(file), _partial(file) as directory:
        temporary = directory / file.name
        yield temporary
        temporary.chmod(directory.stat().st_mode & 0o666)  # safetensors' are private
        _to_disk(temporary)
        os.replace(temporary, file)
        _to_disk(file.parent)


@contextlib.contextmanager
def staged(out: Path, size: int) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        out: must not exist, or be an empty directory.
        size: bytes that will be written, to refuse early when the disk is too small.

    Raises:
        AHNError: `out` is taken, the disk is too small, or writing fails.
    """
    with _reporting(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AHNError(f"{out} exists already and is not an empty directory: choose another output or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        out = out.resolve()  # a name such as out/../out goes through what is replaced
        with _partial(out) as temporary:
            free = shutil.disk_usage(out.parent).free
            if free < size:
                raise AHNError(f"{out.parent} has {free / 1e6:,.1f} MB free, the output needs {size / 1e6:,.1f} MB.")
            yield temporary
            for path in sorted(temporary.rglob("*"), reverse=True):
                _to_disk(path)
            if out.exists():
                out.rmdir()
            temporary.rename(out)
            _to_disk(out.parent)


def write_text(file: Path, text: str) -> None:
    """Write a text as UTF-8."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write JSON types."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors as a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(file) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:  # the library's own word for a full disk
            raise OSError(str(error)) from error


def check_readable(file: Path, or_pipe: bool = False) -> None:
    """Raises AHNError for what is there but is no file: reading a device may never end, and a pipe may wait for ever.

    Args:
        or_pipe: a pipe will do, as a shell gives for `<(command)`.
    """
    # Unlike Path's, these are False for names that no path can have; who opens the file says so.
    if os.path.exists(file) and not (os.path.isfile(file) or (or_pipe and file.is_fifo())):
        raise AHNError(f"{file} is not a file.")


def read_text(file: Path) -> str:
    """The text in a file.

    Raises:
        AHNError: there is no such file, or it is no UTF-8 text.
    """
    check_readable(file, or_pipe=True)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AHNError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise AHNError(f"{file} cannot be read: {reason(error)}.") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        AHNError: there is no such file, or it holds something else.
    """
    check_readable(file)
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise AHNError(f"{file} is not read: it has {size / 1e9:.1f} GB, far more than any of its kind.")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AHNError(f"{file.parent} has no {file.name}.") from None
    except UnicodeDecodeError as error:
        raise AHNError(f"{file} cannot be read as JSON: it is not UTF-8 text (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        if isinstance(error, AHNError):
            raise
        raise AHNError(f"{file} cannot be read as JSON: {reason(error)}.") from error
    return json_object(text, str(file))


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text, which may be anything.

    Raises:
        AHNError: the text is not JSON, nested too deeply to be read, or something other than an object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise AHNError(f"{where} cannot be read as JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise AHNError(f"{where} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise AHNError(f"{where} must hold a JSON object.")
    return content


@contextlib.contextmanager
def _reporting(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AHNError(f"Writing {target} failed: {reason(error)}. What was there is unchanged.") from error


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, locked, which is gone afterwards. What killed runs left is removed first."""
    _clear(target.parent)
    path, lock = _claim(target)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # before the lock goes; after a rename nothing has this name
        _unlock(lock)


def _claim(target: Path) -> tuple[Path, int | None]:
    while True:
        path = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.ahn.partial")
        path.mkdir()
        # In the moment before it is locked another process may take it for a left-over: it locks it, and removes it.
        with contextlib.suppress(BlockingIOError):
            lock = _lock(path)
            if path.exists():
                return path, lock
            _unlock(lock)


def _clear(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if not _PARTIAL.fullmatch(path.name) or path.is_symlink():
                continue
            with contextlib.suppress(BlockingIOError):
                if (lock := _lock(path)) is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    _unlock(lock)


def _lock(directory: Path) -> int | None:
    """Lock a directory; None if it is gone, and where nothing can be locked (some network drives).

    Raises:
        BlockingIOError: another has locked it.
    """
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _unlock(handle)
        raise
    except OSError:
        _unlock(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power failure."""
    if path.is_dir() and fcntl is None:
        return
    handle = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # a full disk may show only here; some file systems cannot do this to a directory
            raise
    finally:
        os.close(handle)
