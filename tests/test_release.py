"""What a release consists of: version, source distribution, wheel, image; and the wheel works where it is alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from ahn.training.arguments import parse

ROOT = Path(__file__).parents[1]
NEEDS_GIT = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a clone and git")


def elsewhere() -> dict[str, str]:
    """The environment, without what leads to this checkout."""
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return known | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(*command: object, folder: Path, given: str = "", **environment: str) -> str:
    """What a command prints, in an environment that does not know this checkout."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        env=elsewhere() | environment,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def copy_of_the_repository(to: Path) -> Path:
    """The files that git knows or would take up, without its folder."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # one that is deleted and not yet committed is not
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def version_of(folder: Path) -> str:
    return run(sys.executable, "-m", "hatchling", "version", folder=folder).strip()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_have_bounds_and_dependencies_of_tests_are_pinned() -> None:
    described = project()["project"]
    extras = described["optional-dependencies"]
    wanted = [one for group in (described["dependencies"], *extras.values()) for one in group]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        assert name
        if name[0] not in ("ahn", "triton"):  # this package; and what fits torch's build
            assert re.search(r"[=><]", requirement), requirement
            assert name[0] in pinned, f"constraints.txt has no version of {name[0]}"


BROUGHT = {
    "aiohttp": "ray", "fuzzywuzzy": "lm-eval", "rouge": "lm-eval", "hatchling": "hatch-vcs", "nbformat": "nbclient",
}  # fmt: skip
"""Packages that another one of `test-all` installs, or one of ours that it needs for it."""
NOT_INSTALLED = {"parameterized", "guidellm", "chromium", "git", "curl", "google-chrome", "vllm"}
"""What some tests use where somebody has it."""


def test_what_tests_are_skipped_without_is_installed_for_all_of_them() -> None:
    described, asked = project()["project"], set[str]()
    for file in (ROOT / "tests").rglob("*.py"):
        asked |= set(
            re.findall(r"(?:importorskip|shutil\.which|find_spec)\(\"(\w[\w-]*)", file.read_text(encoding="utf-8"))
        )
    wanted = [one for group in described["optional-dependencies"].values() for one in group] + described["dependencies"]
    installed = {re.match(r"[\w.-]+", one)[0].replace("-", "_") for one in wanted}
    missing = {name for name in asked if name not in installed | BROUGHT.keys() | NOT_INSTALLED}
    assert not missing, f"add to the extra test-all: {sorted(missing)}"
    assert all(name.replace("-", "_") in installed for name in BROUGHT.values())


def test_the_newest_changes_and_the_citation_have_a_version() -> None:
    released = re.findall(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert cited and cited[1] == released[0]
    fallback = project()["tool"]["hatch"]["version"]["fallback-version"]
    assert fallback > released[0], "a version without a tag is later than the last release"


def test_what_the_image_copies_is_there_and_reaches_the_builder() -> None:
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)
        for name in line.split()[:-1]
    ]
    sent = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.M)
    assert len(copied) >= 6 and sorted(sent) == sorted(copied)
    assert all((ROOT / name).exists() for name in copied)
    project_files = {"README.md", "hatch_build.py", *project()["project"]["license-files"]}
    assert project_files <= set(copied), "the wheel is built from these"


def test_the_image_installs_what_there_is() -> None:
    extras = re.findall(r"\[([\w,-]+)\]\"$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    assert extras and set(extras[0].split(",")) <= set(project()["project"]["optional-dependencies"])


def test_image_and_workflows_take_what_is_supported_and_there() -> None:
    """Their Pythons are those that pyproject.toml names, the tested pairs the Makefile's, and the files exist."""
    classifiers = project()["project"]["classifiers"]
    pythons = {word for line in classifiers if re.fullmatch(r"3\.\d+", word := line.rpartition(" ")[2])}
    image = re.search(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    assert image and image[1] in pythons
    workflows = {path.name: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*.yml")}
    jobs = [job for workflow in workflows.values() for job in workflow["jobs"].values()]
    steps = [step for job in jobs for step in job["steps"]]
    named = {str(step["with"]["python-version"]) for step in steps if "python-version" in step.get("with", {})}
    matrix = workflows["versions.yml"]["jobs"]["core"]["strategy"]["matrix"]
    assert named - {"${{ matrix.python }}"} <= pythons and set(matrix["python"]) == pythons
    for name in ("transformers", "torch"):
        listed = re.search(rf"^{name.upper()} := (.+)$", (ROOT / "Makefile").read_text(), flags=re.M)
        assert listed and listed[1].split() == matrix[name]
    files = [word for step in steps for word in re.findall(r"(?<!\S)(?:\.ci|tests)/\S+", step.get("run", ""))]
    assert len(files) > 5 and all((ROOT / name).exists() for name in files)


def test_shipped_configurations_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings, _ = parse(["configs/debug.yaml", "--use_cpu", "true", "--output_dir", "out"])
    assert settings.dataset == "stdlib"
    (tmp_path / "configs").mkdir()
    own = "model_name_or_path: ahn-tiny\ndataset: stdlib-held-out\n"
    (tmp_path / "configs/debug.yaml").write_text(own)
    settings, _ = parse(["configs/debug.yaml", "--use_cpu", "true", "--output_dir", "out"])
    assert settings.dataset == "stdlib-held-out", "one's own file comes first"


@pytest.mark.parametrize("repository", ["", "https://example.org/ahn/"])
def test_an_index_gets_links_that_lead_somewhere(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.setenv("REPOSITORY_URL", repository)
    spec = importlib.util.spec_from_file_location("ahn_hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metadata: dict[str, Any] = {}
    module.RepositoryLinks(str(ROOT), {}).update(metadata)
    readme = metadata["readme"]["text"]
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert targets and all(re.match("https?:|#", target) for target in targets)
    assert ("https://example.org/ahn/raw/HEAD/docs/images/ahn.svg" in targets) == bool(repository)
    assert ("https://example.org/ahn/blob/HEAD/docs/serving.md" in targets) == bool(repository)
    assert all(url.startswith("https://") for url in metadata["urls"].values())
    assert ("Source" in metadata["urls"]) == bool(repository)
    assert module.with_links("[a [b]](c.md#d) ![e](f.png) [g](#h)", "") == "a [b]  [g](#h)"


@pytest.mark.slow
@NEEDS_GIT
def test_the_version_is_the_tag_or_a_later_one(tmp_path: Path) -> None:
    plain = copy_of_the_repository(tmp_path / "plain")
    fallback = project()["tool"]["hatch"]["version"]["fallback-version"]
    assert version_of(plain) == fallback

    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main")
    clone = copy_of_the_repository(tmp_path / "clone")
    run(*git, "init", "--quiet", folder=clone)
    run(*git, "add", "--all", folder=clone)
    run(*git, "commit", "--quiet", "--message", "first", folder=clone)
    assert version_of(clone).startswith(fallback.split(".dev")[0]), "a clone without tags"

    run(*git, "tag", "v9.8.7", folder=clone)
    assert version_of(clone) == "9.8.7"
    run(*git, "archive", "--output", tmp_path / "archive.tar", "HEAD", folder=clone)
    (tmp_path / "archive").mkdir()
    with tarfile.open(tmp_path / "archive.tar") as archive:
        archive.extractall(tmp_path / "archive", filter="data")
    assert version_of(tmp_path / "archive") == "9.8.7", "an archive as a website makes it"
    run(*git, "commit", "--quiet", "--allow-empty", "--message", "second", folder=clone)
    assert version_of(clone).startswith("9.8.8.dev1+g")


@pytest.mark.slow
@NEEDS_GIT
def test_wheel_and_source_distribution_work_alone(tmp_path: Path) -> None:
    copy = copy_of_the_repository(tmp_path / "copy")
    version = {"SETUPTOOLS_SCM_PRETEND_VERSION": "9.8.7", "REPOSITORY_URL": "https://example.org/ahn"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", folder=copy, **version)
    (source,) = (tmp_path / "dist").glob("ahn-9.8.7.tar.gz")
    (wheel,) = (tmp_path / "dist").glob("ahn-9.8.7-py3-none-any.whl")
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", source, wheel, folder=tmp_path)
    assert source.stat().st_size <= 16e6 and wheel.stat().st_size <= 16e6  # weights, most of all: 17 MB unpacked

    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        described = archive.read("ahn-9.8.7.dist-info/METADATA").decode()
    assert "Project-URL: Source, https://example.org/ahn\n" in described
    for file in (*(ROOT / "src/ahn").rglob("*"), *(ROOT / "configs").rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            name = file.relative_to(ROOT / "src" if "src" in file.relative_to(ROOT).parts else ROOT)
            assert (name if name.parts[0] == "ahn" else "ahn" / name).as_posix() in inside
    with tarfile.open(source) as archive:
        assert "ahn-9.8.7/CHANGELOG.md" in archive.getnames()
    _works_outside_the_checkout(wheel, tmp_path)


def _works_outside_the_checkout(wheel: Path, folder: Path) -> None:
    """In an environment with this wheel, over the packages that it depends on."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "bare", folder=folder)
    python = folder / "bare/bin/python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(packages) / "below.pth").write_text(below)
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"),
        *("--ignore-installed", wheel),
        folder=folder,
    )
    ahn = folder / "bare/bin/ahn"
    found = run(ahn, "env", folder=folder)
    assert re.search(r"^ahn +9\.8\.7 *$", found, flags=re.M) and "from a file or repository" in found
    assert run(ahn, "--version", folder=folder) == "ahn 9.8.7\n"

    small = ("--length", 640, "--documents", 1, "--out", "demo")
    assert "full attention" in run(ahn, "demo", *small, folder=folder)
    assert (folder / "demo/figure.png").stat().st_size > 0
    said = run(ahn, "chat", "--max-new-tokens", 4, folder=folder, given="def add(a, b):\n")
    assert said.strip()
    _serves(ahn, folder)
    steps = ("--max_steps", 1, "--cutoff_len", 130, "--max_eval_samples", 2)
    assert "with the memory" in run(ahn, "train", "configs/debug.yaml", "--output_dir", "out", *steps, folder=folder)
    assert (folder / "out/model.safetensors").exists()


def _serves(ahn: Path, folder: Path) -> None:
    command = [str(ahn), "serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env=elsewhere(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout
            address = next(found[0] for line in server.stdout if (found := re.findall(r"http://[\w.:]+", line)))
            asked = json.dumps({"prompt": "def add(", "max_tokens": 2}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/completions", asked, headers)
            for _ in range(60):  # the address is printed a little before it answers
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        assert json.load(answer)["choices"][0]["text"]
                    break
                except urllib.error.URLError:
                    time.sleep(1)
            else:
                raise AssertionError("the server does not answer")
        finally:
            server.terminate()
