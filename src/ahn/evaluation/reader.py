"""Greedy answers of a model: what prompts have in common is read once, everything in chunks, at constant memory."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ahn import private
from ahn.cache.other import recurs
from ahn.errors import AHNError, is_out_of_memory
from ahn.measure.reading import chunk_size, in_chunks, new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompts = Mapping[int, list[int]]
"""Token ids by any number that tells prompts apart."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """How answers are generated: greedily, with what else the model's own generation settings say.

    The benchmarks' scripts call `generate(do_sample=False)`, where those settings (such as Qwen's repetition penalty)
    stay in force.
    """

    max_new_tokens: int
    ends: tuple[int, ...]
    """Token ids that end an answer."""
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stops: Sequence[str] = ()
    ) -> Generation:
        """The settings for a model. `stops` end an answer at their last token, once there is a first one."""
        ends = end_tokens(model, tokenizer)
        ends |= {tokenizer(stop, add_special_tokens=False)["input_ids"][-1] for stop in stops}
        penalty = model.generation_config.repetition_penalty
        return cls(max_new_tokens, tuple(sorted(ends)), int(bool(stops)), 1.0 if penalty is None else penalty)

    def arguments(self) -> dict[str, Any]:
        """For `model.generate`."""
        ends = list(self.ends) or None
        return {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if ends else 0,
        }


class Reader:
    """Reads prompts and generates answers with one model.

    Args:
        progress: called with (tokens of a prompt read so far, its tokens).
        tokenizer: for generation settings of the model that are about text, such as `stop_strings`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        progress: Callable[[int, int], None] = lambda read, total: None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.progress, self.tokenizer = model, progress, tokenizer
        self.chunk = chunk_size(model)

    @torch.inference_mode()
    def answers(
        self, prompts: Prompts, generation: Generation, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """The answer to each prompt: its number and new token ids, in any order.

        What several prompts start with is read once, and the cache copied where they part. Where chunks end depends on
        `prompts` alone, so an answer is the same whichever others are `wanted`.

        Args:
            prompts: of one token or more.
            wanted: numbers of the prompts to answer; None is all of them.
        """
        yield from self._fork(dict(prompts), set(prompts if wanted is None else wanted), generation, None, 0)

    @torch.inference_mode()
    def side_by_side(self, prompts: Prompts, generation: Generation) -> Iterator[tuple[int, list[int]]]:
        """The answer to each prompt: its number and new token ids; all are read, and answered, at the same time.

        As many tokens as all of them have are read without padding, which is faster. What is left of each prompt comes
        behind padding, so memory and time are those of the longest. On a GPU an answer can differ from that of the
        prompt alone, since a batch's sums are rounded otherwise.

        Args:
            prompts: of one token or more.

        Raises:
            AHNError: the base has recurrent layers, which take padding amid a text for text.
        """
        cache = new_cache(self.model, len(prompts))
        if any(map(recurs, cache.layers)):
            raise AHNError(
                f"{type(self.model).__name__} has recurrent layers, which would take the padding between prompts of a "
                "batch for text: answer one prompt at a time (leave --batch out)."
            )
        common, width = min(map(len, prompts.values())) - 1, max(map(len, prompts.values()))
        # Padding repeats a token of its own row: a repetition penalty counts what stands there.
        rows = [ids[:common] + [ids[0]] * (width - len(ids)) + ids[common:] for ids in prompts.values()]
        tokens = torch.tensor(rows, device=self.model.device)
        mask = torch.ones_like(tokens)
        for row, ids in zip(mask, prompts.values(), strict=True):
            row[common : common + width - len(ids)] = 0
        for start, stop in self._pieces(common, width):
            hidden = {} if stop <= common else _padded(mask[:, :stop], start)
            given = {"input_ids": tokens[:, start:stop], "use_cache": True, "logits_to_keep": 1, private.CACHE: cache}
            self.model(**given, **hidden)
            self.progress(stop, width)
        given = {"input_ids": tokens, "attention_mask": mask, private.CACHE: cache}
        output = generated(self.model, self.tokenizer, **given, **generation.arguments())
        self.progress(width, width)
        for number, answer in zip(prompts, output[:, width:].tolist(), strict=True):
            yield number, _ended(answer, generation.ends)

    def _pieces(self, common: int, width: int) -> Iterator[tuple[int, int]]:
        """What is read before `generate`, which reads the rest: at most a chunk, and no padding together with text."""
        for start, stop in ((0, common), (common, max(common, width - self.chunk))):
            yield from ((at, min(at + self.chunk, stop)) for at in range(start, stop, self.chunk))

    def _fork(
        self, prompts: dict[int, list[int]], wanted: set[int], generation: Generation, cache: Any, read: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Answers to prompts that share their first `read` tokens, which are in the cache. The cache is used up."""
        if not wanted & prompts.keys():
            return
        cache = new_cache(self.model) if cache is None else cache
        if len(prompts) == 1:
            ((number, ids),) = prompts.items()
            yield number, self._generate(ids, cache, read, generation)
            return
        # A token of each must be left for `generate` to begin with.
        shared = min(common_prefix(list(prompts.values())), min(map(len, prompts.values())) - 1)
        self._read(next(iter(prompts.values())), cache, read, shared)
        branches = _branches(prompts, shared)
        for branch in branches[:-1]:
            if wanted & branch.keys():
                yield from self._fork(branch, wanted, generation, copy.deepcopy(cache), shared)
        yield from self._fork(branches[-1], wanted, generation, cache, shared)

    def _generate(self, ids: list[int], cache: Any, read: int, generation: Generation) -> list[int]:
        # What is left for `generate` itself is at most a chunk, so a short prompt is read as plain transformers does.
        rest = max(read, len(ids) - self.chunk)
        self._read(ids, cache, read, rest, of=len(ids))
        tokens = torch.tensor([ids], device=self.model.device)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), private.CACHE: cache}
        output = generated(self.model, self.tokenizer, **given, **generation.arguments())
        self.progress(len(ids), len(ids))
        return output[0, len(ids) :].tolist()

    def _read(self, ids: list[int], cache: Any, start: int, stop: int, of: int | None = None) -> None:
        for read, _ in in_chunks(self.model, cache, ids, start, stop, self.chunk):
            self.progress(read, of or stop)


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **arguments: Any) -> Tensor:
    """Token ids (1, length) of `model.generate`, prompt first, with the model's own settings beside the arguments.

    Raises:
        AHNError: the model's settings do not fit together, or its scores are not numbers.
    """
    checked = LogitsProcessorList([FirstScores(model), *(arguments.get("logits_processor") or ())])
    arguments |= {"tokenizer": tokenizer, "return_dict_in_generate": False, "logits_processor": checked}
    try:
        return model.generate(**arguments)
    except AHNError:
        raise
    except Exception as error:
        if not isinstance(error, ValueError) and (is_out_of_memory(error) or not _chooses_tokens(error)):
            raise
        reason = " ".join(str(error).split())
        raise AHNError(
            f"The model's generation settings (generation_config.json) do not work here: {reason}"
        ) from error


def _chooses_tokens(error: Exception) -> bool:
    """Whether it is transformers' own choice of tokens that failed, which the model's settings alone decide.

    transformers checks few of them: a wrong type, or a token that the model does not have, ends in any kind of error.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("transformers.generation.")


class FirstScores(LogitsProcessor):
    """Raises AHNError if a text's first scores are NaN, before a token is made of them; later ones would make it wait.

    Greedy text of such scores is one token again and again, which looks like a bad model and scores like one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.asked = model, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.asked and bool(scores.isnan().any()):
            raise not_numbers(self.model)
        self.asked = True
        return scores


def not_numbers(model: PreTrainedModel) -> AHNError:
    """What is wrong with a model that computes NaN."""
    dtype = str(model.dtype).removeprefix("torch.")
    return AHNError(
        f"The model's scores are not numbers (NaN): it computes more than {dtype} can hold (try another --dtype), or "
        "its weights are damaged."
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end an answer: what the model's generation settings name, and the tokenizer's own."""
    named = model.generation_config.eos_token_id
    return {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}


def _padded(mask: Tensor, start: int) -> dict[str, Tensor]:
    """Arguments of a forward for the tokens from `start` on of rows of which mask (B, L) says what is no padding."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, start:]}


def _ended(answer: list[int], ends: Collection[int]) -> list[int]:
    """An answer up to its first end token: others of the same batch were longer."""
    last = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return answer[: last + 1]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Number of ids that all begin with."""
    shortest, longest = min(sequences), max(sequences)  # in order: all others lie between them
    for position, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b:
            return position
    return min(len(shortest), len(longest))


def _branches(prompts: dict[int, list[int]], shared: int) -> list[dict[int, list[int]]]:
    """Prompts that share `shared` ids, by the next one; each on its own if that is the same too (one ends there).

    The smallest come first: the largest goes on with the cache itself, so few copies are alive at a time.
    """
    branches: dict[int, dict[int, list[int]]] = {}
    for number, ids in prompts.items():
        branches.setdefault(ids[shared], {})[number] = ids
    if len(branches) == 1:
        return [{number: ids} for number, ids in prompts.items()]
    return sorted(branches.values(), key=len)
