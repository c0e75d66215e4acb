"""LV-Eval as tasks of the harness, which has none: data, prompts and scores are those of `ahn eval lveval`."""

from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from transformers import AutoTokenizer

from ahn.errors import AHNError
from ahn.evaluation import prompt
from ahn.evaluation.task import Options, Sample, Task
from ahn.evaluation.tasks import lveval

ROOM = 128
"""Tokens kept free for a chat template when a prompt is cut for a model's `max_length`."""


class LVEvalTask(ConfigurableTask):
    """A task at a length, such as `lveval_factrecall_en_16k`.

    `--metadata '{"data_dir": …, "protocol_dir": …}'` takes local files, as `ahn eval` does. Prompts are cut in the
    middle as the benchmark does it, to 256000 tokens or to the model's `max_length`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        name, metadata = config["task"], config.get("metadata") or {}
        task, _, level = name.removeprefix("lveval_").rpartition("_")
        self._task = _find([task, level], metadata)
        super().__init__(
            config={
                "task": name,
                "output_type": "generate_until",
                "test_split": "test",
                "custom_dataset": self._documents,
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{answers[0]}}",
                "process_results": self._score,
                "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
                "generation_kwargs": {"max_gen_toks": self._task.max_new_tokens, "do_sample": False, "until": []},
                "metadata": metadata,
            }
        )

    def _documents(self, **metadata: Any) -> dict[str, datasets.Dataset]:
        tokenizer = _tokenizer(metadata)
        assert self._task.truncation is not None
        rows = []
        for sample in self._task.samples():
            text, _ = prompt.shorten(sample.prompt, self._task.truncation, self._task.max_new_tokens, tokenizer)
            keywords = sample.extra.get("keywords")
            rows.append({"id": sample.id, "prompt": text, "answers": list(sample.answers), "keywords": keywords})
        return {"test": datasets.Dataset.from_list(rows)}

    def _score(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        sample = Sample(doc["id"], "", "", tuple(doc["answers"]), {"keywords": doc["keywords"]})
        return {"score": self._task.score(results[0], sample)}


def _find(parts: list[str], metadata: dict[str, Any]) -> Task:
    given = ("data_dir", "protocol_dir")
    directories: dict[str, Any] = {name: Path(metadata[name]) for name in given if metadata.get(name)}
    limit = metadata.get("max_length")
    (task,) = lveval.tasks(parts, Options(**directories))
    if limit is not None:
        (task,) = lveval.tasks(parts, Options(**directories, max_length=int(limit) - task.max_new_tokens - ROOM))
    return task


def _tokenizer(metadata: dict[str, Any]) -> Any:
    """The evaluated model's: the harness tells tasks what `--model_args` were."""
    source = metadata.get("tokenizer") or metadata.get("pretrained")
    if not source:
        raise AHNError("LV-Eval cuts prompts in the model's tokens: name it with --model_args pretrained=….")
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
