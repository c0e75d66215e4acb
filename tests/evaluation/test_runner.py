"""Reading once and asking many times, and what a run leaves; `test_every_task` runs the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_files as files
import pytest
import torch
from support.architectures import build
from transformers import DynamicCache

import ahn
from ahn.errors import AHNError
from ahn.evaluation import methods, runner
from ahn.evaluation.reader import Generation, Reader, common_prefix, new_cache
from ahn.evaluation.results import averages
from ahn.evaluation.task import Sample, Task
from ahn.evaluation.tasks import tasks

GREEDY = Generation(max_new_tokens=6, ends=())
METHODS = tuple(methods.METHODS)


class Toy(Task):
    """Samples given as (context, question); scores are the share of new characters that are a space or a letter."""

    name, profile, max_new_tokens = "toy/one", "official", 6

    def __init__(self, *questions: tuple[str, str]) -> None:
        self.questions = questions

    def samples(self) -> Iterator[Sample]:
        for number, (context, question) in enumerate(self.questions):
            yield Sample(f"s{number}", context, f"{context} {question}", ("a",), {"depth": number})

    def score(self, prediction: str, sample: Sample) -> float:
        return sum(c.isalpha() or c == " " for c in prediction) / max(1, len(prediction))

    def settings(self) -> dict[str, Any]:
        return {"questions": len(self.questions)}


BOOKS = Toy(
    (2 * files.STORY, "Who?"),
    (2 * files.STORY, "Where was the mill?"),
    (2 * files.STORY, "Where was the lamp?"),
    (files.STORY, "Why?"),
    (2 * files.STORY, "When?"),
)


@pytest.fixture(scope="module", params=METHODS)
def evaluated(request: pytest.FixtureRequest, tiny: tuple[str, str]) -> methods.Evaluated:
    """The tiny model with each method, in float32 on the CPU."""
    return methods.load(request.param, *tiny, device="cpu")


@pytest.fixture(scope="module")
def memory(tiny: tuple[str, str]) -> methods.Evaluated:
    return methods.load("ahn", *tiny, device="cpu")


def ids(*texts: str) -> dict[int, list[int]]:
    tokenizer = files.byte_tokenizer()
    return {number: tokenizer(text)["input_ids"] for number, text in enumerate(texts)}


# -- read once, ask many -------------------------------------------------------------------------------------------


def plain(evaluated: methods.Evaluated, prompt: list[int]) -> list[int]:
    """The answer of transformers alone, prompt read in one piece."""
    tokens = torch.tensor([prompt])
    output = evaluated.model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


PROMPTS = {
    "questions on one text": [2 * files.STORY + q for q in ("Who?", "Where was the mill?", "Where was the lamp?")],
    "needles at depths": [
        files.STORY[:d] + "Needle! " + files.STORY[d:] + files.STORY for d in (0, 33, 70, len(files.STORY))
    ],
    "nothing in common": ["abc" * 40, "Zyx" * 40],
    "the same prompt twice": [files.STORY, files.STORY, files.STORY + "?"],
    "one begins the other": [files.STORY[:60], files.STORY, "T"],
    "one prompt": [files.STORY],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("texts", PROMPTS.values(), ids=PROMPTS.keys())
def test_shared_reading_equals_separate_runs(evaluated: methods.Evaluated, texts: list[str]) -> None:
    prompts = ids(*texts)
    together = dict(Reader(evaluated.model).answers(prompts, GREEDY))
    assert together == {number: plain(evaluated, prompt) for number, prompt in prompts.items()}


def test_the_answers_depend_on_what_was_read(memory: methods.Evaluated) -> None:
    """The comparison above would say nothing if every prompt had the same answer."""
    found = dict(Reader(memory.model).answers(ids(*PROMPTS["needles at depths"]), GREEDY))
    assert len({tuple(answer) for answer in found.values()}) > 1


class Counted(Reader):
    """Counts tokens that the model reads, and caches that are copied."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tokens, self.longest = 0, 0
        self._hook = model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        length = (kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]).shape[1]
        self.tokens += length
        self.longest = max(self.longest, length)

    def total(self, prompts: dict[int, list[int]], **options: Any) -> int:
        """Tokens read for these answers, without the generated ones that are read again."""
        answers = dict(self.answers(prompts, GREEDY, **options))
        self._hook.remove()
        return self.tokens - len(answers) * (GREEDY.max_new_tokens - 1)


def test_a_shared_context_is_read_once(memory: methods.Evaluated) -> None:
    prompts = ids(*PROMPTS["questions on one text"])
    parts = (2 * files.STORY, "Wh", "o?", "ere was the ", "mill?", "lamp?")
    assert Counted(memory.model).total(prompts) == sum(map(len, parts))
    # A needle's haystack is shared up to the needle.
    prompts = ids(*PROMPTS["needles at depths"])
    whole = sum(map(len, prompts.values()))
    # Three share 33 tokens, two of them 37 more.
    assert Counted(memory.model).total(prompts) == whole - 2 * 33 - 37


def test_only_what_is_wanted_is_read_with_the_same_chunks(memory: methods.Evaluated) -> None:
    prompts = ids(*PROMPTS["questions on one text"])
    all_of_them = dict(Reader(memory.model).answers(prompts, GREEDY))
    for number in prompts:
        assert dict(Reader(memory.model).answers(prompts, GREEDY, {number})) == {number: all_of_them[number]}
    assert Counted(memory.model).total(prompts, wanted={0}) == len(prompts[0])
    assert dict(Reader(memory.model).answers(prompts, GREEDY, set())) == {}


def test_long_prompts_are_read_in_chunks(memory: methods.Evaluated) -> None:
    """So peak memory does not grow; the core's tests measure it."""
    reader = Counted(memory.model)
    seen: list[tuple[int, int]] = []
    reader.progress = lambda read, total: seen.append((read, total))
    prompt = ids(5 * files.STORY)[0]
    reader.total({0: prompt})
    assert reader.longest == reader.chunk == memory.model.ahn_config.prefill_chunk_size == 40
    assert seen == [(40, len(prompt)), *seen[1:-1], (len(prompt), len(prompt))]
    assert [read for read, _ in seen] == sorted(read for read, _ in seen)


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [([[1, 2, 3], [1, 2, 4], [1, 2]], 2), ([[1], [2]], 0), ([[1, 2]], 2), ([[3, 1], [3, 1, 0], [3, 9]], 1)],
)
def test_common_prefix(sequences: list[list[int]], shared: int) -> None:
    assert common_prefix(sequences) == shared


# -- side by side --------------------------------------------------------------------------------------------------


@pytest.mark.sample(4)
@pytest.mark.parametrize("texts", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompts_side_by_side_have_the_answers_of_each_alone(evaluated: methods.Evaluated, texts: list[str]) -> None:
    prompts = ids(*texts)
    together = dict(Reader(evaluated.model).side_by_side(prompts, GREEDY))
    assert together == {number: plain(evaluated, prompt) for number, prompt in prompts.items()}


def test_an_answer_beside_longer_ones_ends_at_its_own_end(memory: methods.Evaluated) -> None:
    prompts = ids(*PROMPTS["needles at depths"])
    free = {number: plain(memory, prompt) for number, prompt in prompts.items()}
    end = free[0][1]
    found = dict(Reader(memory.model).side_by_side(prompts, Generation(6, (end,))))
    assert found == {n: x[: x.index(end) + 1] if end in x else x for n, x in free.items()}
    assert len(found[0]) < 6


def test_a_repetition_penalty_does_not_see_what_stands_beside(memory: methods.Evaluated) -> None:
    """Padding must be no new token of a row: here that would be the end token, which then would not be said."""
    prompts = ids("abc " * 9, "Zyx")
    generation = Generation(6, (0,), repetition_penalty=1.5)
    reader = Reader(memory.model)
    alone = {number: answer for n, x in prompts.items() for number, answer in reader.answers({n: x}, generation)}
    assert dict(reader.side_by_side(prompts, generation)) == alone


# -- generation ----------------------------------------------------------------------------------------------------


def test_generation_ends_where_model_tokenizer_or_task_says(memory: methods.Evaluated) -> None:
    model, tokenizer = memory.model, memory.tokenizer
    newline = tokenizer("\n")["input_ids"][-1]
    assert Generation.of(model, tokenizer, 9) == Generation(9, (0,))
    assert Generation.of(model, tokenizer, 9, ("\n",)) == Generation(9, (0, newline), min_new_tokens=1)
    model.generation_config.eos_token_id = [5, 7]
    try:
        assert Generation.of(model, tokenizer, 9).ends == (0, 5, 7)
    finally:
        model.generation_config.eos_token_id = None


def test_an_answer_ends_at_an_end_token_but_not_before_its_first(memory: methods.Evaluated) -> None:
    prompt = ids(files.STORY)[0]
    reader = Reader(memory.model)
    ((_, free),) = reader.answers({0: prompt}, GREEDY)
    end = free[2]
    ((_, ended),) = reader.answers({0: prompt}, Generation(6, (end,)))
    assert ended == free[: free.index(end) + 1]
    ((_, stopped),) = reader.answers({0: prompt}, Generation(6, (free[0],), min_new_tokens=1))
    assert stopped[0] != free[0]


def test_settings_of_the_model_stay_in_force(memory: methods.Evaluated) -> None:
    """As in the benchmarks' scripts: Qwen's generation settings hold a repetition penalty, over prompt and answer."""
    model, prompt = memory.model, ids(3 * "abc ")[0]
    model.generation_config.repetition_penalty = 50.0
    try:
        generation = Generation.of(model, memory.tokenizer, 6)
    finally:
        model.generation_config.repetition_penalty = None
    ((_, answer),) = Reader(model).answers({0: prompt}, generation)
    assert generation.repetition_penalty == 50.0
    assert not set(answer) & set(prompt)
    assert len(set(answer)) == len(answer)
    model.generation_config.update(return_dict_in_generate=True, stop_strings=["never said"])
    try:
        ((_, again),) = Reader(model, tokenizer=memory.tokenizer).answers({0: prompt}, generation)
    finally:
        model.generation_config.update(return_dict_in_generate=None, stop_strings=None)
    assert again == answer


@pytest.mark.parametrize("attached", [True, False])
def test_a_recurrent_base_reads_no_padding_amid_a_text(attached: bool) -> None:
    """transformers masks padding in a recurrence only where a text begins."""
    model = build("qwen3_5_text")
    if attached:
        ahn.attach(model, ahn.AHNConfig(window=9, sinks=2))
    with pytest.raises(AHNError, match=r"recurrent layers.*leave --batch out"):
        dict(Reader(model).side_by_side({0: [3, 4, 5, 6], 1: [5, 6]}, GREEDY))


class Apart(Toy):
    """Prompts with nothing in common, but for two."""

    def __init__(self) -> None:
        super().__init__(*((files.STORY[n:], f"Who {n}?") for n in (0, 9, 30, 30, 41, 50, 62)))


@pytest.mark.parametrize("batch", [2, 3, 99])
def test_a_batch_changes_no_answer_and_is_a_configuration_of_its_own(
    memory: methods.Evaluated, tmp_path: Path, batch: int
) -> None:
    (one,) = runner.run([Apart()], memory, tmp_path)
    (together,) = runner.run([Apart()], memory, tmp_path, batch=batch)
    rows = [(tmp_path / folder.name / "predictions.jsonl").read_text("utf-8") for folder in tmp_path.iterdir()]
    assert len(rows) == 2 and rows[0] == rows[1] and one["digest"] != together["digest"]


def test_a_batch_that_was_interrupted_is_answered_as_it_would_have_been(
    memory: methods.Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    whole = Reader.side_by_side

    def counted(self: Reader, prompts: Any, generation: Generation) -> Any:
        seen.append(list(prompts))
        return whole(self, prompts, generation)

    monkeypatch.setattr(Reader, "side_by_side", counted)
    runner.run([Apart()], memory, tmp_path, batch=3)
    assert seen == [[0, 1, 4], [5, 6]]  # 2 and 3 share their text
    (folder,) = tmp_path.iterdir()
    result, rows = (folder / "result.json").read_text(), (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    (folder / "result.json").unlink()
    (folder / "predictions.jsonl").write_text("\n".join(rows[:4]) + "\n", "utf-8")
    seen.clear()
    runner.run([Apart()], memory, tmp_path, batch=3)
    assert seen == [[0, 1, 4], [5, 6]] and (folder / "result.json").read_text() == result
    assert (folder / "predictions.jsonl").read_text("utf-8").splitlines() == rows


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_and_its_folder(memory: methods.Evaluated, tmp_path: Path) -> None:
    (result,) = runner.run([BOOKS], memory, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"toy_one-official-tiny-base-ahn-gated_deltanet-w48+8-{result['digest'][:10]}"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "predictions.jsonl",
        "result.json",
        "timing.0.jsonl",
    ]
    assert json.loads((folder / "result.json").read_text()) == result
    assert {name: result[name] for name in ("task", "method", "window", "sinks", "samples", "limit")} == {
        "task": "toy/one",
        "method": "ahn",
        "window": 48,
        "sinks": 8,
        "samples": 5,
        "limit": None,
    }
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5))
    assert result["score"] == round(100 * sum(row["score"] for row in rows) / 5, 2)
    template = "<{}>"
    for row, sample in zip(rows, BOOKS.samples(), strict=True):
        prompt = memory.tokenizer(template.format(sample.prompt))["input_ids"]
        answer = plain(memory, prompt)
        assert row["prediction"] == memory.tokenizer.decode(answer[: [*answer, 0].index(0)])
        assert row["score"] == BOOKS.score(row["prediction"], sample)
        assert (row["prompt_tokens"], row["extra"], row["answers"]) == (len(prompt), sample.extra, ["a"])
    assert files.STORY[:20] not in (folder / "predictions.jsonl").read_text()  # no contexts
    timing = [json.loads(line) for line in (folder / "timing.0.jsonl").read_text().splitlines()]
    assert {line["index"] for line in timing} == set(range(5))


def test_the_folder_tells_everything_that_can_change_a_score(memory: methods.Evaluated, tmp_path: Path) -> None:
    runner.run([BOOKS], memory, tmp_path, limit=1)
    ((config,),) = [[*folder.glob("config.json")] for folder in tmp_path.iterdir()]
    described = json.loads(config.read_text())
    settings = described["settings"]
    assert settings["limit"] == 1
    assert settings["versions"]["ahn"] and settings["versions"]["transformers"]
    assert settings["generation"] == {
        "max_new_tokens": 6,
        "ends": [0],
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
        "greedy": True,
    }
    for name in ("task", "profile", "truncation", "chat_template", "weights", "tokenizer", "method", "dtype", "window"):
        assert name in settings
    assert described["about"]["model"].endswith("tiny-base")


@pytest.mark.slow
def test_two_configurations_never_share_a_folder(tiny: tuple[str, str]) -> None:
    """Every change that can move a score gives another digest."""

    def digest(task: Task = BOOKS, limit: int | None = None, **how: Any) -> str:
        chosen = {"method": "ahn", "model": tiny[0], "adapter": tiny[1], "device": "cpu"} | how
        from ahn.evaluation.results import digest as of

        return of(runner.describe(task, methods.load(**chosen), limit)[0])

    longer, templateless, paper, stopping = Toy(*BOOKS.questions), Toy(*BOOKS.questions), Toy(), Toy()
    longer.max_new_tokens, templateless.chat_template = 7, False
    paper.profile, stopping.stops = "paper", ("\n",)
    found = [
        digest(),
        digest(limit=3),
        digest(longer),
        digest(templateless),
        digest(paper),
        digest(stopping),
        digest(window=47),
        digest(sinks=7),
        digest(dtype="bfloat16"),
        *(digest(method=method) for method in METHODS if method != "ahn"),
    ]
    assert len(set(found)) == len(found)
    assert digest() == found[0]


def test_a_finished_run_is_not_repeated(
    memory: methods.Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runner.run([BOOKS], memory, tmp_path)
    monkeypatch.setattr(Reader, "answers", None)
    assert runner.run([BOOKS], memory, tmp_path) == first


def test_bad_data_fail_before_the_model_reads(memory: methods.Evaluated, tmp_path: Path) -> None:
    class Broken(Toy):
        def samples(self) -> Iterator[Sample]:
            yield from super().samples()
            raise AHNError("line 6 is malformed.")

    reader = Counted(memory.model)
    with pytest.raises(AHNError, match="line 6"):
        runner.run([Broken(*BOOKS.questions)], memory, tmp_path)
    with pytest.raises(AHNError, match="toy/one has no samples"):
        runner.run([Toy()], memory, tmp_path)
    assert reader.tokens == 0


def test_limit_and_mean(memory: methods.Evaluated, tmp_path: Path) -> None:
    other = Toy(*BOOKS.questions[:1])
    other.name = "toy/two"
    results = runner.run([BOOKS, other], memory, tmp_path, limit=2)
    assert [result["samples"] for result in results] == [2, 1]
    assert averages(results) == {"toy": sum(result["score"] for result in results) / 2}
    assert averages(results[:1]) == {}
    levels = [{"task": f"lveval/{task}/{level}", "score": 4.0} for task in "ab" for level in ("16k", "32k")]
    assert averages(levels) == {"lveval/16k": 4.0, "lveval/32k": 4.0}


def test_full_attention_reads_with_an_ordinary_cache(tiny: tuple[str, str]) -> None:
    model = methods.load("full", *tiny, device="cpu").model
    assert type(new_cache(model)) is DynamicCache
    model = methods.load("window", *tiny, device="cpu").model
    assert type(new_cache(model)) is ahn.AHNCache


def test_the_shipped_model_and_an_answer_that_is_right(protocol_dir: Path, tmp_path: Path) -> None:
    """With the model's own prediction as second answer the score is 100."""
    try:
        evaluated = methods.load("window", str(ahn.tiny.path()), window=40, sinks=4, device="cpu")
    except AHNError as error:
        pytest.skip(str(error))
    row = files.longbench_row(0, context="def add(first, second):\n    return first", input="What is this?")
    for answers, expected in ((["?"], 0.0), (["?", "..."], 100.0)):
        if expected:
            (predictions,) = tmp_path.glob("*/predictions.jsonl")
            answers[1] = json.loads(predictions.read_text())["prediction"]
        files.write_longbench(tmp_path, hotpotqa=[row | {"answers": answers}])
        (task,) = tasks("longbench/hotpotqa", data_dir=tmp_path, protocol_dir=protocol_dir)
        (result,) = runner.run([task], evaluated, tmp_path)
        assert result["score"] == expected
