"""Numbers that the paper printed (arXiv 2510.07318), to stand beside measured ones. Nobody measured them here.

At 128k tokens with 128 sinks and a window of 32640, LongBench with 8064 + 128; Qwen2.5-Instruct. CT is the Compressive
Transformer, KL and CE are losses of training, with the window drawn at random or fixed.
"""

from ahn.evaluation.report.collect import Column
from ahn.evaluation.tasks import longbench, lveval

LONG = ("lveval/128k", "infinitebench")
METHODS = ("full attention", "sinks + window", "CT-Max", "CT-Avg", "AHN mamba2", "AHN deltanet", "AHN gated_deltanet")
AVERAGES = {
    "3B": ("4.41 9.52", "4.59 10.47", "4.12 10.00", "4.47 10.81", "5.13 12.44", "5.68 13.51", "5.88 13.24"),
    "7B": ("3.62 13.50", "5.34 13.16", "4.82 13.00", "5.28 13.31", "6.21 14.21", "6.82 16.48", "6.54 16.93"),
    "14B": ("4.99 12.21", "5.69 12.54", "5.28 11.66", "5.64 11.95", "6.43 15.21", "6.50 17.48", "6.51 16.52"),
}
"""LV-Eval's and InfiniteBench's average of each method, by the size of the model."""
LONGBENCH_7B = {
    "sinks + window": 38.52,
    "CT-Max": 38.29,
    "CT-Avg": 38.50,
    "AHN mamba2": 40.56,
    "AHN deltanet": 41.04,
    "AHN gated_deltanet": 40.59,
}
ABLATION_7B = {"AHN gated_deltanet, CE, random window": 39.59, "AHN gated_deltanet, KL, window fixed at 1024": 38.53}
"""LongBench averages of other ways to train; the row without a remark is KL with a random window."""
NEEDLES = (
    *(f"niah_single_{n}" for n in (1, 2, 3)),
    *(f"niah_multikey_{n}" for n in (1, 2, 3)),
    "niah_multivalue",
    "niah_multiquery",
)
RULER_7B = {
    "full attention": (98.6, 97.2, 98.4, 89.2, 23.6, 23.2, 55.4, 85.5),
    "sinks + window": (26.8, 25.4, 28.0, 27.8, 10.6, 9.0, 23.0, 24.0),
    "AHN gated_deltanet": (26.8, 25.2, 28.2, 27.4, 11.4, 8.6, 23.5, 23.4),
}
"""RULER at 128k, in the order of `NEEDLES`."""


def rows() -> dict[str, dict[str, float]]:
    """Everything published, by model and method: scores by the label that a column has here."""
    found: dict[str, dict[str, float]] = {}
    for size, pairs in AVERAGES.items():
        for method, pair in zip(METHODS, pairs, strict=True):
            numbers = dict(zip(LONG, map(float, pair.split()), strict=True))
            found[f"Qwen2.5-{size}, {method}"] = {f"mean of {name}": number for name, number in numbers.items()}
            if size == "7B" and method in LONGBENCH_7B:
                found[f"Qwen2.5-{size}, {method}"]["mean of longbench"] = LONGBENCH_7B[method]
    for method, score in ABLATION_7B.items():
        found[f"Qwen2.5-7B, {method}"] = {"mean of longbench": score}
    for method, scores in RULER_7B.items():
        needles = {f"ruler/{task}/128k": score for task, score in zip(NEEDLES, scores, strict=True)}
        found[f"Qwen2.5-7B, {method}"] |= needles
    return found


def comparable(column: Column) -> bool:
    """Whether a column is what the paper printed: all samples, and the mean over just the paper's tasks.

    Published means of InfiniteBench and LongBench are those of the profile "paper"; LV-Eval's profiles are one.
    """
    profile, limit = column.way
    members = {name.partition(" (")[0] for name in column.members}
    wanted = {
        "mean of lveval/128k": {f"lveval/{task}/128k" for task in lveval.TASKS},
        "mean of infinitebench": {"infinitebench/en_qa", "infinitebench/zh_qa"} if profile == "paper" else None,
        "mean of longbench": {f"longbench/{task}" for task in longbench.PAPER_TASKS} if profile == "paper" else None,
    }
    return limit is None and (members == wanted[column.name] if column.name in wanted else not members)
