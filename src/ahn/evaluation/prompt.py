"""From a sample's prompt to token ids: shortened as the profile does it, then as a user's message."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.evaluation.task import Task, Truncation
from ahn.measure.parts import render
from ahn.measure.tokens import token_ids


def encode(prompt: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether it was shortened.

    A chat template is used because the tokenizer has one, whatever the model is called; thinking is off where a
    template knows of it, as in the paper's scripts.
    """
    text, shortened = prompt, False
    if task.truncation is not None:
        text, shortened = shorten(prompt, task.truncation, task.max_new_tokens, tokenizer)
    if task.chat_template and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = render(tokenizer, message, ask=True, enable_thinking=False)
    # A template that starts with the first token of a text itself must not get a second one.
    first = tokenizer.bos_token
    return token_ids(tokenizer, text, special=not (first and text.startswith(first))), shortened


def shorten(prompt: str, how: Truncation, max_new_tokens: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """A prompt of no more tokens than the limit, as text, and whether anything was taken away.

    The text can have a few tokens more or fewer when it is tokenised again, as in the benchmarks' scripts.
    """
    ids = token_ids(tokenizer, prompt)
    parts = kept(ids, how, max_new_tokens)
    if len(ids) <= how.limit:
        return prompt, False
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts), True


def kept(ids: Sequence[int], how: Truncation, max_new_tokens: int) -> tuple[Sequence[int], ...]:
    """What stays of a prompt's token ids, in parts that are decoded one by one.

    Where the middle goes, `int(limit / 2)` ids stay on either side, with an odd limit one fewer than the limit. LV-Eval
    (`truncate_prompt` in utils.py) and LongBench (pred.py) decode the halves apart, which shows where the cut splits
    a character; InfiniteBench (`truncate_input` in src/eval_yarn_mistral.py) decodes them as one. The paper's script
    (eval/longbench/pred.py) keeps the last `limit - max_new_tokens`: a prompt of exactly `limit` ids stays whole, one
    with a single id more loses `max_new_tokens` as well.
    """
    room = how.limit - max_new_tokens
    if how.keep == "last" and room < 1:
        raise AHNError(
            f"A limit of {how.limit} tokens leaves no prompt beside {max_new_tokens} new ones: raise the limit."
        )
    if how.limit < 2:  # with no half to keep the benchmarks' slice [-0:] would keep everything
        raise AHNError(f"A prompt cannot be cut to {how.limit} tokens: the limit must be 2 or more.")
    if len(ids) <= how.limit:
        return (ids,)
    if how.keep == "last":
        return (ids[-room:],)
    first, last = ids[: how.limit // 2], ids[-(how.limit // 2) :]
    return (first, last) if how.keep == "halves" else ([*first, *last],)
