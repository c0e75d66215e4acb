"""Protocols from the benchmarks' files (small ones of our own in their format), from a directory, from the cache.

What is published of them, without the benchmarks' texts, is compared with in `protocol_forms.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ahn.errors import AHNError
from ahn.evaluation import protocol_sources
from ahn.evaluation.protocol import load_protocol, protocol_digest
from ahn.evaluation.protocol_recipes import RECIPES
from ahn.evaluation.tasks import infinitebench, longbench, lveval

# Our own benchmarks in the formats of the real ones: path in the repository -> content.
FILES = {
    "lveval": {
        "config.py": """
            from metrics import qa_f1_score, rouge_zh_score_blacklist  # is never imported
            raise SystemExit("is never executed")
            DATASET_MAXGEN = {"lamps": 8}
            DATASET_MAXGEN = {"lamps": 12, "灯塔": 7}
            DATASET_PROMPT = {
                "lamps": "Text: {context}\\nAsk: {input}\\n",  # a comment
                "灯塔": "文 {context}"  "问 {input}",
            }
            DATASET_METRIC = {"lamps": qa_f1_score, "灯塔": rouge_zh_score_blacklist}
        """,
        "metrics.py": """
            ABANDON_WORDS_EN = ['near', "under"]
            ABANDON_WORDS_ZH = ['旁边']
            def ABANDON(): pass
        """,
    },
    "longbench": {
        "LongBench/config/dataset2maxlen.json": '{"lamps": 12, "code": 7}',
        "LongBench/config/dataset2prompt.json": '{"lamps": "Text: {context}\\nAsk: {input}", "code": "{context}next"}',
    },
    "infinitebench": {
        "src/prompt.py": """
            gpt4_templates = {
                "longbook_qa_eng": "{context} One: {question}", "longbook_qa_chn": "{context} 一 {question}",
                "other": "a" + "{file:{context}}", "more": open("x"),
            }
            yarn_mistral_templates = {"longbook_qa_eng": "{context} Two", "longbook_qa_chn": "{context} 二"}
            claude2_templates = {"longbook_qa_chn": "{context} 三", "longbook_qa_eng": "{context} {input} Three"}
        """,
    },
}
EXPECTED: dict[str, dict[str, Any]] = {
    "lveval": {
        "DATASET_MAXGEN": {"lamps": 12, "灯塔": 7},
        "DATASET_PROMPT": {"lamps": "Text: {context}\nAsk: {input}\n", "灯塔": "文 {context}问 {input}"},
        "DATASET_METRIC": {"lamps": "qa_f1_score", "灯塔": "rouge_zh_score_blacklist"},
        "ABANDON_WORDS_EN": ["near", "under"],
        "ABANDON_WORDS_ZH": ["旁边"],
    },
    "longbench": {
        "dataset2maxlen.json": {"lamps": 12, "code": 7},
        "dataset2prompt.json": {"lamps": "Text: {context}\nAsk: {input}", "code": "{context}next"},
    },
    "infinitebench": {
        "prompts": {
            "gpt4": {"longbook_qa_eng": "{context} One: {question}", "longbook_qa_chn": "{context} 一 {question}"},
            "yarn_mistral": {"longbook_qa_eng": "{context} Two", "longbook_qa_chn": "{context} 二"},
            "claude2": {"longbook_qa_eng": "{context} {input} Three", "longbook_qa_chn": "{context} 三"},
        },
        "max_new_tokens": {"longbook_qa_eng": 40, "longbook_qa_chn": 40},
    },
}
NAMES = list(FILES)


class Remote:
    """Our files in place of GitHub's, and the recipes that pin them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.content: dict[str, bytes] = {}
        self.fetched: list[str] = []
        monkeypatch.setattr(protocol_sources, "fetch", self.fetch)
        for name, files in FILES.items():
            self.publish(name, files, EXPECTED[name])

    def fetch(self, url: str) -> bytes:
        self.fetched.append(url)
        return self.content[url]

    def publish(self, name: str, files: dict[str, str], outcome: dict[str, Any]) -> None:
        """Pin these files as the benchmark's, with what must come of them."""
        sources = []
        for path, text in files.items():
            content = _bytes(text)
            sources.append(protocol_sources.Source("us/ours", "c0ffee", path, hashlib.sha256(content).hexdigest()))
            self.content[sources[-1].url] = content
        digest = protocol_digest({"sources": [dataclasses.asdict(source) for source in sources], **outcome})
        recipe = dataclasses.replace(RECIPES[name], sources=tuple(sources), digest=digest)
        self.patch.setitem(RECIPES, name, recipe)


def _bytes(text: str) -> bytes:
    return "\n".join(line.strip() for line in text.strip().splitlines()).encode()


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Remote:
    return Remote(monkeypatch)


# From the benchmark's own files


@pytest.mark.parametrize("name", NAMES)
def test_downloaded_and_parsed(remote: Remote, tmp_path: Path, name: str) -> None:
    protocol = load_protocol(name, cache_dir=tmp_path)
    sources = protocol.pop("sources")
    assert protocol == EXPECTED[name]
    assert list(protocol) == list(EXPECTED[name])
    assert [source["path"] for source in sources] == list(FILES[name])
    assert {(source["repository"], source["revision"]) for source in sources} == {("us/ours", "c0ffee")}
    assert remote.fetched == [f"https://raw.githubusercontent.com/us/ours/c0ffee/{path}" for path in FILES[name]]


@pytest.mark.parametrize("name", NAMES)
def test_own_files_in_a_directory(remote: Remote, tmp_path: Path, name: str) -> None:
    """A clone of the benchmark's repository will do, without network."""
    for path, text in FILES[name].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(_bytes(text))
    protocol = load_protocol(name, protocol_dir=tmp_path)
    assert remote.fetched == []
    assert protocol == load_protocol(name, cache_dir=tmp_path / "cache")


def test_wrong_sha256(remote: Remote, tmp_path: Path) -> None:
    url = RECIPES["lveval"].sources[1].url
    remote.content[url] += b"#"
    expected, found = RECIPES["lveval"].sources[1].sha256, hashlib.sha256(remote.content[url]).hexdigest()
    with pytest.raises(AHNError) as error:
        load_protocol("lveval", cache_dir=tmp_path)
    for part in (url, "metrics.py of us/ours at c0ffee", f"expected sha256 {expected}", f"found {found}"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_wrong_sha256_in_a_directory(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_bytes(_bytes(FILES["lveval"]["config.py"]))
    (tmp_path / "metrics.py").write_text("x = 1")
    with pytest.raises(
        AHNError, match=rf"{tmp_path}/metrics.py is not metrics.py of us/ours.*expected sha256 \w+, found"
    ):
        load_protocol("lveval", protocol_dir=tmp_path)


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("no route"), TimeoutError("timed out"), ConnectionResetError("reset")], ids=repr
)
def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception) -> None:
    def urlopen(url: str, timeout: float) -> None:
        raise failure

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(AHNError, match=r"https://raw.*could not be downloaded.*--protocol-dir"):
        load_protocol("lveval", cache_dir=tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(AHNError, match="Unknown protocol 'glue': choose one of lveval, longbench, infinitebench"):
        load_protocol("glue")


# The cache


def test_second_time_needs_no_network(remote: Remote, tmp_path: Path) -> None:
    first = load_protocol("lveval", cache_dir=tmp_path / "new")
    remote.content.clear()
    assert load_protocol("lveval", cache_dir=tmp_path / "new") == first
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["lveval.json"]  # no temporary files


def test_default_cache(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_protocol("longbench")
    assert (tmp_path / "ahn" / "protocols" / "longbench.json").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("Text: ", "Txt: "),
        lambda text: text.replace("c0ffee", "beef"),
        lambda text: "[]",
    ],
    ids=["cut off", "edited", "another version", "something else"],
)
def test_unusable_cache_is_replaced(remote: Remote, tmp_path: Path, damage: Callable[[str], str]) -> None:
    first = load_protocol("longbench", cache_dir=tmp_path)
    file = tmp_path / "longbench.json"
    good = file.read_text(encoding="utf-8")
    file.write_text(damage(good), encoding="utf-8")
    assert load_protocol("longbench", cache_dir=tmp_path) == first
    assert len(remote.fetched) == 4
    assert file.read_text(encoding="utf-8") == good


def test_cache_that_cannot_be_written(remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert load_protocol("longbench", cache_dir=tmp_path / "file")["dataset2maxlen.json"]["code"] == 7
    assert "could not be cached" in caplog.text


# Finished protocols in a directory


def _finished(directory: Path, name: str, **changes: Any) -> Path:
    """A finished protocol of our own, with `None` for what is left out."""
    protocol = {"sources": []} | EXPECTED[name] | changes
    file = directory / f"{name}.json"
    file.write_text(json.dumps({k: v for k, v in protocol.items() if v is not None}), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", NAMES)
def test_own_finished_protocol(tmp_path: Path, name: str) -> None:
    _finished(tmp_path, name)
    assert load_protocol(name, protocol_dir=str(tmp_path)) == {"sources": []} | EXPECTED[name]


def test_edited_protocol_must_not_claim_the_benchmarks_sources(tmp_path: Path) -> None:
    pinned = [dataclasses.asdict(source) for source in RECIPES["longbench"].sources]
    file = _finished(tmp_path, "longbench", sources=pinned)
    with pytest.raises(AHNError, match=rf"{file} names the benchmark's pinned files.*expected digest \w+, found \w+"):
        load_protocol("longbench", protocol_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lveval", {"DATASET_METRIC": None}, "the field 'DATASET_METRIC' is missing"),
        ("lveval", {"ABANDON_WORDS_EN": None}, "the field 'ABANDON_WORDS_EN' is missing"),
        ("lveval", {"ABANDON_WORDS_EN": ["a", 1]}, "ABANDON_WORDS_EN must be a list of strings"),
        ("lveval", {"ABANDON_WORDS_ZH": "旁边"}, "ABANDON_WORDS_ZH must be a list of strings"),
        ("lveval", {"DATASET_METRIC": {"lamps": "bleu"}}, r"DATASET_METRIC\['lamps'\] must be one of"),
        ("lveval", {"DATASET_MAXGEN": {"灯塔": 7}}, "must be of the same tasks, but differ in lamps"),
        ("longbench", {"dataset2maxlen.json": {"lamps": 0}}, r"\['lamps'\] must be a number"),
        ("longbench", {"dataset2maxlen.json": {"lamps": True}}, r"\['lamps'\] must be a number"),
        ("longbench", {"dataset2maxlen.json": []}, "maxlen.json must be an object"),
        ("longbench", {"dataset2prompt.json": {"lamps": "{context} {"}}, "balanced braces"),
        ("longbench", {"dataset2prompt.json": {"lamps": "text"}}, r"text with \{context\}"),
        ("longbench", {"dataset2prompt.json": {}}, "with one entry or more"),
        ("longbench", {"sources": None}, "'sources' must be a list of objects with path, repository"),
        ("longbench", {"sources": [{"path": "x"}]}, "'sources' must be a list of objects with path, repository"),
        ("infinitebench", {"prompts": {"gpt4": {}}}, r"prompts\['gpt4'\] must be an object"),
        ("infinitebench", {"prompts": {"gpt4": {"longbook_qa_eng": "{context}"}}}, "differ in longbook_qa_chn"),
        ("infinitebench", {"prompts": {"gpt4": "{context}"}}, r"prompts\['gpt4'\] must be an object"),
    ],
)
def test_malformed_finished_protocol(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    file = _finished(tmp_path, name, **changes)
    with pytest.raises(AHNError, match=rf"{file}.*{message}"):
        load_protocol(name, protocol_dir=tmp_path)


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "longbench.json"
    file.write_text('{"sources": [],\n"x": }', encoding="utf-8")
    with pytest.raises(AHNError, match=rf"{file} cannot be read as JSON.*line 2"):
        load_protocol("longbench", protocol_dir=tmp_path)


def test_directory_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(AHNError, match=r"holds neither lveval.json nor.*config.py, metrics.py not found"):
        load_protocol("lveval", protocol_dir=tmp_path)


# The published outcome


FORMS = json.loads(Path(__file__).with_name("protocol_forms.json").read_text(encoding="utf-8"))
"""The published protocols without the texts that belong to the benchmarks: of a prompt only the fields that it
fills in, of the stop words only those that occur in `published_rows.json`."""


def test_pinned_sources_are_the_published_ones() -> None:
    for name in NAMES:
        assert [dataclasses.asdict(source) for source in RECIPES[name].sources] == FORMS[name]["sources"]


def test_our_tasks_are_the_published_ones() -> None:
    assert set(FORMS["lveval"]["DATASET_PROMPT"]) == set(lveval.TASKS)
    assert set(FORMS["longbench"]["dataset2prompt.json"]) == set(longbench.TASKS)
    assert set(FORMS["infinitebench"]["max_new_tokens"]) == set(infinitebench.TASKS.values())


@pytest.mark.parametrize("name", NAMES)
def test_published_form_from_its_sources(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources in the benchmark's format with its tasks, lengths and metrics; its texts are not copied."""
    fields = {key: value for key, value in FORMS[name].items() if key != "sources"}
    remote = Remote(monkeypatch)
    remote.publish(name, _sources_of(name, fields), fields)
    protocol = load_protocol(name, cache_dir=tmp_path)
    sources = protocol.pop("sources")
    assert protocol == fields
    cached = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    assert cached == json.dumps({"sources": sources} | fields, ensure_ascii=False, indent=1)


def _sources_of(name: str, fields: dict[str, Any]) -> dict[str, str]:
    if name == "longbench":
        return {path: json.dumps(fields[path.rsplit("/", 1)[-1]]) for path in FILES[name]}
    if name == "infinitebench":
        return {"src/prompt.py": "\n".join(f"{style}_templates = {p!r}" for style, p in fields["prompts"].items())}
    functions = ", ".join(f"{task!r}: {function}" for task, function in fields["DATASET_METRIC"].items())
    return {
        "config.py": f"DATASET_MAXGEN = {fields['DATASET_MAXGEN']!r}\nDATASET_PROMPT = {fields['DATASET_PROMPT']!r}\n"
        f"DATASET_METRIC = {{{functions}}}",
        "metrics.py": "\n".join(f"{field} = {fields[field]!r}" for field in ("ABANDON_WORDS_EN", "ABANDON_WORDS_ZH")),
    }
