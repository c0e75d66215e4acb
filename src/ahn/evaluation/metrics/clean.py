"""What a profile does to a generated text before it is scored."""

FIRST_LINE_ONLY = frozenset({"trec", "triviaqa", "samsum", "lsht"})  # LongBench, `scorer` in eval.py

# The AHN paper's scorer (eval/longbench/eval.py of ByteDance-Seed/AHN) ends a text at each of these in turn.
_PAPER_ENDS = (".assistant", "\n\nQuestion", "</s>", "(Document", "\n\nAnswer", "(Passage")
_PAPER_TASK_ENDS = {
    "multifieldqa_zh": ("问题\uff1a",),  # \uff1a: the full-width colon
    "dureader": ("问题\uff1a",),
    "lsht": ("新闻内容\uff1a",),
    "passage_retrieval_zh": ("请问", "提示"),
}


def clean_prediction(prediction: str, benchmark: str, task: str, profile: str) -> str:
    """The part of a generated text that is scored.

    LV-Eval scores the text as it is, and so does InfiniteBench in its own profile. The paper's scripts score LongBench
    and InfiniteBench with one program, so both are cut there.
    """
    if profile == "paper" and benchmark in ("longbench", "infinitebench"):
        prediction = _until(prediction, _PAPER_ENDS).strip()
    if benchmark == "longbench" and task in FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if benchmark == "longbench" and profile == "paper" and task in _PAPER_TASK_ENDS:
        prediction = _until(prediction, _PAPER_TASK_ENDS[task]).strip()
    return prediction


def _until(text: str, ends: tuple[str, ...]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text
