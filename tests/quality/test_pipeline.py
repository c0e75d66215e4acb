"""benchmarks/quality/run.py from a small folder of packages to figures, in processes and pieces; and its corpus."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ahn.errors import AHNError
from ahn.tiny.corpus import stdlib

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

import run
from stages import jobs
from stages.corpus import LARGE, SMALL, choose_held_out, is_text, split
from stages.pool import Pool
from stages.recipe import BASELINES, Corpus
from stages.recipes import RECIPES, STUDY, TINY, smoke
from stages.rows import Results

MODULES = ("argparse", "difflib", "ast", "calendar", "cgi", "csv", "dis", "heapq", "locale", "statistics", "textwrap")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules of the standard library, each as a package."""
    folder = tmp_path_factory.mktemp("packages")
    for name in MODULES:
        source = stdlib() / f"{name}.py"
        if source.exists():
            (folder / name).mkdir()
            shutil.copy(source, folder / name / "__init__.py")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Path:
    """A smoke run of everything, its rows shared by two processes."""
    out = tmp_path_factory.mktemp("study")
    run.main(["--smoke", "--out", str(out), "--device", "cpu", "--jobs", "2", "--corpus", str(packages)])
    return out


@pytest.mark.slow
def test_everything_is_measured_once(study: Path) -> None:
    recipe = smoke(STUDY)
    rows = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    assert len({(row["method"], row["seed"], row["context"], row["budget"]) for row in rows}) == len(rows)
    assert {row["seed"] for row in rows} == {None, 0, 1}
    places = {(row["method"], row["context"], row["budget"]) for row in rows}
    near = recipe.contexts[0]
    expected = [run.name for run in recipe.runs] + list(BASELINES)
    for budget in near.budgets:
        assert {method for method, context, kept in places if (context, kept) == (near.length, budget)} == set(expected)
    far = {method for method, context, _ in places if context == recipe.contexts[1].length}
    assert far == {*BASELINES, *[run.name for run in recipe.runs if run.far]}
    for row in rows:
        assert row["sinks"] + row["window"] + row["slots"] <= row["budget"] or row["method"] == "full"
        assert row["loss_window"] > 0 and row["loss_full"] > 0 and len(row["won_back"]) == 3
        assert row["versions"]["torch"] and row["device"] and len(row["recipe"]) == 12
    parameters = {row["method"]: row["parameters"] for row in rows}
    assert (
        parameters["gated_deltanet"]
        == json.loads((study / "distill" / "gated_deltanet.json").read_text())["parameters"]
    )
    page = (study / "report.md").read_text()
    for name in ("cost", "won_back", "recall", "positions", "repeats", "far", "needles", "ablations"):
        assert f"figures/{name}.png" in page and (study / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_rows_with_quantized_tokens_take_the_bytes_that_they_should(study: Path) -> None:
    recipe = smoke(STUDY)
    rows = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not row["seed"]]
    parts = ("kv_bytes", "quantized_bytes", "state_bytes", "gate_bytes")
    taken = {(row["method"], row["context"], row["budget"]): sum(row[part] for part in parts) for row in rows}
    checked = 0
    for row in rows:
        run = next((run for run in recipe.runs if run.name == row["method"]), None)
        tier = None if run is None else run.tier
        place = (row["context"], row["budget"])
        if tier is None:
            assert row["quantized"] == row["quantized_bytes"] == 0
            continue
        assert row["sinks"] + row["window"] == int(tier.exact * row["budget"])
        if tier.bytes_of is None:
            assert row["quantized"] == round(tier.windows * row["window"])
            continue
        ours, theirs = taken[(row["method"], *place)], taken[(tier.bytes_of, *place)]
        one = recipe.layers * recipe.kv_heads * 2 * (recipe.head_dim // 4 + 2) + 64  # a token, and its gates
        beyond = row["context"] - row["sinks"] - row["window"]
        full = row["quantized"] == beyond
        assert row["quantized"] <= beyond
        assert ours <= theirs and (full or theirs - ours < one)
        checked += 1
    assert checked >= 4


@pytest.mark.slow
def test_what_is_done_is_not_done_again(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in study.rglob("*") if path.is_file() and "figures" not in path.parts]
    made = {path: path.stat().st_mtime_ns for path in files if path.name not in ("results.jsonl", "report.md")}
    with monkeypatch.context() as patch:
        patch.setattr(jobs.Worker, "give", None)  # no process is wanted
        run.main(["--smoke", "--out", str(study), "--device", "cpu"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert not list(study.rglob("*.part"))


@pytest.mark.slow
def test_a_row_that_fails_stops_no_other_and_is_named(
    study: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = Path(shutil.copytree(study, tmp_path / "study"))
    for name in ("full", "deltanet", "mamba2"):
        (out / "evaluation" / f"{name}.jsonl").unlink()
    shutil.rmtree(out / "adapters" / "deltanet")
    (out / "distill" / "mamba2.json").unlink()
    with pytest.raises(SystemExit, match=r"^failed: deltanet$"):
        run.main(["evaluate", "report", "--smoke", "--out", str(out), "--device", "cpu"])
    found = {json.loads(line)["method"] for line in (out / "results.jsonl").read_text().splitlines()}
    assert "full" in found
    output, errors = capfd.readouterr()
    assert "mamba2: mamba2 is not trained yet" in output and "deltanet: " in errors


@pytest.mark.slow
def test_ablations_are_compared_with_the_recipes_own_training(study: Path) -> None:
    results = Results(smoke(STUDY), study)
    pairs = results.pairs()
    assert {(group.method, other.method) for group, other in pairs} == {
        ("gated_deltanet-ce", "gated_deltanet"),
        ("routed_deltanet-long", "routed_deltanet"),
    }
    group, other = next(pair for pair in pairs if pair[0].method == "gated_deltanet-ce")
    assert [row["seed"] for row in other.seeds] == [0]  # the same batches; there is another seed
    value, low, high = group.minus(other, "chunk_losses")
    assert low <= value <= high
    assert value == pytest.approx(group.first["loss"] - other.first["loss"], abs=1e-4)
    window = next(g for g in results.groups if g.method == "window_only")
    full = next(g for g in results.groups if g.method == "full")
    assert window.won_back()[0] == 0 and full.won_back()[0] == 1


@pytest.mark.slow
def test_held_out_packages_are_not_trained_on(packages: Path, study: Path) -> None:
    held_out = json.loads((study / "prepare.json").read_text())["held_out_tokens"]
    assert {"argparse", "difflib"} < set(held_out)
    tokenizer = AutoTokenizer.from_pretrained(study / "model")
    text = tokenizer.decode(np.load(study / "train.npy"))
    for name in MODULES:
        source = packages / name / "__init__.py"
        if source.exists():
            whole = source.read_text().replace("\r\n", "\n").rstrip("\n")
            assert (whole in text) == (name not in held_out), name


def test_copies_and_tests_of_held_out_text_are_left_out(packages: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packages, tmp_path / "packages")
    for name, source in (("vendored", "difflib"), ("twice", "heapq")):
        (folder / name).mkdir()
        shutil.copy(folder / source / "__init__.py", folder / name / "copy.py")
    (folder / "suite").mkdir()
    (folder / "suite" / "test_argparse.py").write_text("import argparse\n\n\ndef test_nothing():\n    pass\n")
    (folder / "suite" / "other.py").write_text("def function_of_no_interest():\n    return 1\n")
    (folder / "suite" / "table.py").write_text("rows = [\n" + "    1002003004, 1002003005,\n" * 100 + "]\n")
    found = split(Corpus("installed", 100, 1000), Pool(), [folder])
    train = dict(found.train)
    assert "vendored" not in train and "difflib" not in train
    assert "twice" not in train and ("heapq" in train) != ("heapq" in dict(found.held_out))
    assert train.get("suite", ["def function_of_no_interest():\n    return 1\n"]) == [
        "def function_of_no_interest():\n    return 1\n"
    ]
    with pytest.raises(AHNError, match="too little Python source"):
        split(Corpus("installed", 100, 1000), Pool(), [tmp_path / "none"])


def test_held_out_packages_depend_on_names_alone() -> None:
    sizes = {f"package{n}": LARGE if n % 3 == 0 else SMALL for n in range(400)} | {"huge": 10**9, "small": 10}
    chosen = choose_held_out(sizes)
    assert len(chosen) == 9  # 2 % of 402
    assert not {"huge", "small"} & set(chosen)
    assert sum(sizes[name] >= LARGE for name in chosen) >= 4
    assert choose_held_out(dict(reversed(list(sizes.items())))) == chosen


def test_tables_are_no_text() -> None:
    assert is_text("def f(x):\n    return x\n")
    assert not is_text("")
    assert not is_text("x = '" + "a" * 2000 + "'\n")
    assert not is_text("x = [\n" + "12345, 67890,\n" * 50 + "]\n")


def test_the_study_is_what_it_says() -> None:
    assert set(RECIPES) == {"tiny", "study"}
    for recipe in RECIPES.values():
        names = [run.name for run in recipe.runs]
        assert len(set(names)) == len(names) and {run.of for run in recipe.runs} - {None} <= set(names)
    from stages.model import build

    class Tokenizer:
        eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return STUDY.corpus.vocabulary

    model = build(STUDY, Tokenizer())
    parameters = sum(p.numel() for p in model.parameters())
    assert 25e6 < parameters < 30e6
    assert max(phase.length for phase in STUDY.phases) == 8192
    # A row's digest names its own training and not the others'.
    prints = [STUDY.fingerprint(run) for run in STUDY.runs if run.tier is None]
    assert len(set(prints)) == len(prints) and STUDY.fingerprint() != TINY.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bake"], "unknown stage bake"),
        (["--only", "nothing"], "no run nothing"),
        (["--jobs", "0"], "at least one process"),
        (["card"], "name --recipe tiny"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        run.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
