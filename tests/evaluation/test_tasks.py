"""LV-Eval, LongBench and InfiniteBench: prompts, lengths, truncation, templates and scores of both profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benchmark_files as files
import pytest
from tokenizers.processors import TemplateProcessing

from ahn.errors import AHNError
from ahn.evaluation.prompt import encode, shorten
from ahn.evaluation.task import Options, Sample, Task, Truncation
from ahn.evaluation.tasks import check, infinitebench, longbench, lveval, tasks


@pytest.fixture
def find(tmp_path: Path, protocol_dir: Path) -> Any:
    """`find(spec, profile)`: tasks with our protocols and the data in `tmp_path`."""

    def call(spec: str, profile: str = "official", **options: Any) -> list[Task]:
        return tasks(spec, profile=profile, data_dir=tmp_path, protocol_dir=protocol_dir, **options)

    return call


def names(found: list[Task]) -> list[str]:
    return [task.name for task in found]


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_name_stands_for_all_below_it(find: Any) -> None:
    assert len(find("lveval")) == 55
    assert names(find("lveval/128k")) == [f"lveval/{task}/128k" for task in lveval.TASKS]
    assert names(find("lveval/factrecall_zh")) == [f"lveval/factrecall_zh/{level}" for level in lveval.LEVELS]
    assert names(find("lveval/factrecall_zh/32k")) == ["lveval/factrecall_zh/32k"]
    assert names(find("infinitebench")) == ["infinitebench/en_qa", "infinitebench/zh_qa"]
    assert len(find("longbench")) == 21
    assert names(find("longbench", "paper")) == [f"longbench/{task}" for task in longbench.PAPER_TASKS]
    assert names(find("longbench/trec/")) == ["longbench/trec"]


@pytest.mark.parametrize("module", [lveval, infinitebench, longbench])
def test_listed_names_are_tasks(module: Any, find: Any) -> None:
    for name in module.names():
        check(name)
        assert names(find(name)) == [name]


@pytest.mark.parametrize(
    "spec", ["", "lvevil", "lveval/unknown", "lveval/cmrc_mixup/48k", "lveval/cmrc_mixup/16k/x", "longbench/qmsum/x"]
)
def test_unknown_names(spec: str, find: Any) -> None:
    with pytest.raises(AHNError, match=r"There is no (task|benchmark)"):
        check(spec)
    with pytest.raises(AHNError, match=r"choose one of"):
        find(spec)


@pytest.mark.parametrize("options", [{"profile": "mine"}, {"max_length": 0}, {"depths": (101.0,)}, {"samples": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(AHNError):
        Options(**options)


def test_a_protocol_without_the_task(tmp_path: Path) -> None:
    lengths, prompts = {"trec": 5}, {"trec": "{context}{other}"}
    files.write_json(tmp_path / "longbench.json", {"dataset2maxlen.json": lengths, "dataset2prompt.json": prompts})
    with pytest.raises(AHNError, match="says nothing of qmsum"):
        tasks("longbench/qmsum", protocol_dir=tmp_path)
    files.write_longbench(tmp_path, trec=[files.longbench_row(0, all_classes=["Mira"])])
    (trec,) = tasks("longbench/trec", protocol_dir=tmp_path, data_dir=tmp_path)
    with pytest.raises(AHNError, match="asks for 'other', but there are context, input"):
        next(trec.samples())


# -- LV-Eval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["official", "paper"])
def test_lveval(profile: str, find: Any, tmp_path: Path) -> None:
    files.write_lveval(tmp_path, [files.lveval_row(0), files.lveval_row(1, answer_keywords=...)])
    (task,) = find("lveval/hotpotwikiqa_mixup/16k", profile)
    first, second = task.samples()
    assert first.prompt == (f"Read [hotpotwikiqa_mixup]: 0 {files.STORY}\nQ: What colour was lamp 0?\nA:")
    assert (first.id, second.id) == ("0", "1")
    assert first.context != second.context
    assert (first.extra["keywords"], second.extra["keywords"]) == ("blue", None)
    assert (task.max_new_tokens, task.truncation) == (6, Truncation("halves", 256_000))
    assert task.chat_template
    assert task.score("Blue!", first) == 1.0
    assert task.score("the colour of the sea", first) == 0.0  # the second answer never counts
    # Without keywords there is no threshold; with them "sea blue" would need "blue", which it has.
    assert task.score("sea blue", second) == pytest.approx(2 / 3)


def test_lveval_keywords_and_stop_words_come_from_data_and_protocol(find: Any, tmp_path: Path) -> None:
    rows = [files.lveval_row(0, answers=["lamp of Mira"], answer_keywords="of letters harbour mill seven")]
    files.write_lveval(tmp_path, rows)
    (task,) = find("lveval/hotpotwikiqa_mixup/16k")
    (sample,) = task.samples()
    # "of" is one keyword in five, which would reach the threshold of 0.2, but our protocol bars it.
    assert task.score("lamp of Mira", sample) == 0.0
    assert task.score("seven lamp of Mira", sample) > 0.8


def test_lveval_chinese_and_rouge_tasks_use_their_own_metrics(find: Any) -> None:
    metric = {task.name.split("/")[1]: task.metric for task in find("lveval/16k")}
    assert metric["cmrc_mixup"] == "lv.zh"
    assert metric["dureader_mixup"] == "lv.rouge_blk"
    assert metric["factrecall_en"] == "lv.qa_f1"
    assert metric["loogle_SD_mixup"] == "lv.en"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "hotpotwikiqa_mixup_32k"}, "the field 'dataset' says 32k, expected 16k"),
        ({"length": 250_000}, "the field 'length' is 250000, which is not of the level 16k"),
        ({"length": 9_599}, "the field 'length' is 9599, which is not of the level 16k"),
        ({"length": 30_000}, "the field 'length' is 30000, which is not of the level 16k"),
        ({"answers": []}, "the field 'answers' must not be empty"),
        ({"length": ...}, "the field 'length' is missing"),
    ],
)
def test_lveval_rows_of_another_level(changes: dict[str, Any], message: str, find: Any, tmp_path: Path) -> None:
    files.write_lveval(tmp_path, [files.lveval_row(0), files.lveval_row(1, **changes)])
    (task,) = find("lveval/hotpotwikiqa_mixup/16k")
    with pytest.raises(AHNError, match=rf"mixup\.zip \(hotpotwikiqa_mixup/hotpot.*_16k\.jsonl\), line 2: {message}"):
        list(task.samples())


def test_lveval_reads_the_level_that_was_asked_for(find: Any, tmp_path: Path) -> None:
    files.write_lveval(tmp_path)
    for task in find("lveval/hotpotwikiqa_mixup"):
        level = task.name.split("/")[2]
        lengths = [sample.extra["length"] for sample in task.samples()]
        assert lengths == [lveval.LEVELS[level] - 1000] * 3


# -- LongBench -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("trec", {"all_classes": None}, "'all_classes' must name the classes of longbench/trec"),
        ("trec", {"all_classes": []}, "'all_classes' must name the classes"),
        ("passage_retrieval_en", {"answers": ["7"]}, "the answer '7' in 'answers' must match 'Paragraph"),
        ("passage_retrieval_zh", {"answers": ["段落7", "第7段"]}, "the answer '第7段' in 'answers' must match '段落"),
    ],
)
def test_longbench_answers_that_cannot_be_scored(
    task: str, changes: dict[str, Any], message: str, find: Any, tmp_path: Path
) -> None:
    files.write_longbench(tmp_path, **{task: [files.longbench_row(0, **changes)]})
    (found,) = find(f"longbench/{task}")
    with pytest.raises(AHNError, match=rf"data\.zip \(data/{task}\.jsonl\), line 1: .*{message}"):
        list(found.samples())


def test_longbench_profiles(find: Any, tmp_path: Path) -> None:
    rows = [files.longbench_row(0, answers=["seven letters", "the mill"])]
    files.write_longbench(tmp_path, qmsum=rows, hotpotqa=rows)
    official, paper = (find("longbench/qmsum", profile)[0] for profile in ("official", "paper"))
    assert (official.max_new_tokens, paper.max_new_tokens) == (512, 500)
    assert official.truncation == Truncation("halves", 31_500)
    assert paper.truncation == Truncation("last", 32_000)
    assert find("longbench/qmsum", max_length=100)[0].truncation == Truncation("halves", 100)
    official, paper = (find("longbench/hotpotqa", profile)[0] for profile in ("official", "paper"))
    (sample,) = official.samples()
    assert sample.id == "id0"
    assert official.score("The mill.", sample) == 1.0  # the best of all answers
    # Only the paper's scorer cuts a text where a model goes on with a question of its own.
    going_on = "the mill\n\nQuestion: who else"
    assert official.score(going_on, sample) < paper.score(going_on, sample) == 1.0


def test_longbench_few_shot_tasks(find: Any, tmp_path: Path) -> None:
    few_shot = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    found = {task.name.split("/")[1]: task for task in find("longbench")}
    assert {name for name, task in found.items() if not task.chat_template} == few_shot
    assert {name for name, task in found.items() if task.stops} == {"samsum"}
    assert find("longbench/samsum", "paper")[0].stops == ()
    files.write_longbench(
        tmp_path,
        triviaqa=[files.longbench_row(0)],
        trec=[files.longbench_row(0, answers=["Number"], all_classes=["Number", "Place"])],
    )
    (trivia,) = find("longbench/triviaqa")
    assert trivia.score("\n Mira \nPassage: more", next(trivia.samples())) == 1.0  # its first line
    (trec,) = find("longbench/trec")
    assert trec.score("Number, Place", next(trec.samples())) == 0.5


def test_longbench_of_the_hub_is_the_pinned_archive(protocol_dir: Path, find: Any) -> None:
    assert find("longbench/trec")[0].file.sha256 is None  # a stand-in may have other content
    (task,) = tasks("longbench/trec", protocol_dir=protocol_dir)
    assert task.file.sha256 == longbench.SHA256


# -- InfiniteBench -------------------------------------------------------------------------------------------------


def test_infinitebench_profiles(find: Any, tmp_path: Path) -> None:
    files.write_infinitebench(tmp_path, [files.infinitebench_row(3, book="Book.")], "zh_qa")
    files.write_infinitebench(tmp_path, [files.infinitebench_row(3, book="Book.")])
    official, paper = (find("infinitebench/zh_qa", profile)[0] for profile in ("official", "paper"))
    question = "Why did she carry 3 letters?"
    assert next(official.samples()).prompt == f"yarn_mistral longbook_qa_chn: Book. Q: {question} A:"
    assert next(paper.samples()).prompt == f"gpt4 longbook_qa_eng: Book. Q: {question} A:"  # one for both languages
    assert (official.max_new_tokens, paper.max_new_tokens) == (5, 256)
    assert official.truncation == Truncation("middle-cut", 131_072)
    assert paper.truncation == Truncation("last", 128_000)
    assert (official.metric, paper.metric) == ("ib.f1_zh", "lb.rouge_zh")
    english = find("infinitebench/en_qa")[0]
    sample = next(english.samples())
    assert english.score("unknown", sample) == english.score("Nobody asked", sample) == 1.0
    assert official.score("nobadi", sample) == pytest.approx(2 * 5 / (6 + 11))  # characters: n, o, b, a, d


def test_infinitebench_scores_are_rounded_in_the_paper_only(find: Any) -> None:
    rows = [{"score": 1 / 3}, {"score": 0.0}, {"score": 0.5}]
    assert find("infinitebench/en_qa")[0].summary(rows)["score"] == pytest.approx(100 * (5 / 6) / 3, abs=1e-12)
    assert find("infinitebench/en_qa", "paper")[0].summary(rows)["score"] == 27.78


def test_infinitebench_questions_on_one_book_come_together(find: Any, tmp_path: Path) -> None:
    books = [files.infinitebench_row(number, book=book) for number, book in enumerate("abacba")]
    files.write_infinitebench(tmp_path, books)
    samples = list(find("infinitebench/en_qa")[0].samples())
    assert [sample.id for sample in samples] == ["0", "2", "5", "1", "4", "3"]
    assert [f": {book} Q" in sample.prompt for sample, book in zip(samples, "aaabbc", strict=True)] == [True] * 6
    assert len({sample.context for sample in samples}) == 3


# -- all -----------------------------------------------------------------------------------------------------------


def test_settings_tell_everything_that_a_task_decides(find: Any, tmp_path: Path) -> None:
    files.write_longbench(tmp_path)
    (task,) = find("longbench/hotpotqa")
    before = task.settings() | task.common_settings()
    assert before["prompt"].startswith("Read [hotpotqa]")
    assert before["metric"] == "lb.qa_f1"
    assert len(before["protocol"]) == len(before["data"]["sha256"]) == 64
    assert (find("longbench/hotpotqa", "paper")[0].settings() | task.common_settings()) == before  # profile is common
    files.write_longbench(tmp_path, hotpotqa=[files.longbench_row(5)])
    assert find("longbench/hotpotqa")[0].settings()["data"] != before["data"]


@pytest.mark.parametrize("profile", ["official", "paper"])
def test_every_task_has_a_prompt_and_a_score(profile: str, protocol_dir: Path) -> None:
    for module in (lveval, infinitebench, longbench):
        for name in module.names():
            (task,) = tasks(name, profile=profile, protocol_dir=protocol_dir)
            assert task.prompt.format(context="C", input="I", question="I") != task.prompt
            assert task.score("", Sample("0", "", "", ("段落1 Paragraph 1",))) == 0.0


# -- from prompt to tokens -----------------------------------------------------------------------------------------


class Plain(Task):
    """A task without samples."""

    name, profile, max_new_tokens = "plain", "official", 4

    def samples(self) -> Any:
        return iter(())

    def score(self, prediction: str, sample: Sample) -> float:
        return 0.0

    def settings(self) -> dict[str, Any]:
        return {}


def test_a_chat_template_is_used_because_the_tokenizer_has_one() -> None:
    task, plain = Plain(), files.byte_tokenizer()
    chat = files.byte_tokenizer("<u>{{ messages[0]['content'] }}</u>{% if add_generation_prompt %}<a>{% endif %}")
    assert plain.decode(encode("Ask", task, plain)[0]) == "Ask"
    assert chat.decode(encode("Ask", task, chat)[0]) == "<u>Ask</u><a>"
    task.chat_template = False
    assert chat.decode(encode("Ask", task, chat)[0]) == "Ask"


def test_thinking_is_off_where_a_template_knows_of_it() -> None:
    tokenizer = files.byte_tokenizer("{{ messages[0]['content'] }}{% if not enable_thinking %} no thinking{% endif %}")
    assert tokenizer.decode(encode("Ask", Plain(), tokenizer)[0]) == "Ask no thinking"


def test_a_first_token_is_not_doubled() -> None:
    tokenizer = files.byte_tokenizer("<end>{{ messages[0]['content'] }}")
    tokenizer.bos_token = "<end>"
    begin = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    task = Plain()
    assert encode("Ask", task, tokenizer)[0].count(0) == 1
    task.chat_template = False
    assert encode("Ask", task, tokenizer)[0].count(0) == 1


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Truncation("halves", 6), "abchij"),
        (Truncation("halves", 7), "abchij"),  # int(m / 2) of both
        (Truncation("middle-cut", 6), "abchij"),
        (Truncation("last", 6), "ij"),  # the last limit - max_new_tokens
        (Truncation("last", 10), "abcdefghij"),
        (Truncation("halves", 10), "abcdefghij"),
    ],
)
def test_prompts_are_shortened_before_the_template(how: Truncation, expected: str) -> None:
    task, tokenizer = Plain(), files.byte_tokenizer("<{{ messages[0]['content'] }}>")
    task.truncation = how
    ids, shortened = encode("abcdefghij", task, tokenizer)
    assert tokenizer.decode(ids) == f"<{expected}>"
    assert shortened == (expected != "abcdefghij")


def test_halves_are_decoded_one_by_one() -> None:
    """灯 is three bytes: a cut through it leaves a broken character on each side, or one in the middle."""
    tokenizer = files.byte_tokenizer()
    apart, _ = shorten("a灯----灯b", Truncation("halves", 6), 4, tokenizer)
    together, _ = shorten("a灯----灯b", Truncation("middle-cut", 6), 4, tokenizer)
    assert apart.startswith("a\ufffd") and apart.endswith("\ufffdb")
    assert apart != together == tokenizer.decode(tokenizer("a灯")["input_ids"][:3] + tokenizer("灯b")["input_ids"][-3:])


def test_a_limit_that_leaves_nothing() -> None:
    task = Plain()
    task.truncation = Truncation("last", 4)
    with pytest.raises(AHNError, match="raise the limit"):
        encode("abcdefghij", task, files.byte_tokenizer())
