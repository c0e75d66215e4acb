"""Chat templates of well-known models, shortened to how they write replies, with the tokens they end turns by."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import ahn


class Style(NamedTuple):
    """A template, the tokens it needs, and what a reply `R` becomes: what the model has to say for it."""

    template: str
    tokens: tuple[str, ...]
    said: str
    said_last: str = ""
    """Where the last reply of a conversation is another."""

    def expected(self, replies: list[str]) -> list[str]:
        forms = [self.said] * (len(replies) - 1) + [self.said_last or self.said]
        return [form.replace("R", reply) for form, reply in zip(forms, replies, strict=True)]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
WORDS = (  # turns that end by words which are no token of their own
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n### End\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QWEN3 = (  # thoughts of earlier turns are dropped, the last turn always has a block of them
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% set thoughts = m.reasoning_content or '' %}"
    "{% if not thoughts and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "<think>\n{{ thoughts.strip('\\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (  # asks for thoughts in the prompt, and shows those of no turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)

PARTS = (  # as of models that see images, which leave a string out without a word
    "{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}"
    "{% if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

STYLES = {
    "parts": Style(PARTS, ("<end_of_utterance>",), " R<end_of_utterance>"),
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>"), "R<|im_end|>"),
    "gemma": Style(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "R<end_of_turn>"),
    "phi3": Style(PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), "R<|end|>"),
    "mistral": Style(MISTRAL, ("<s>", "[INST]", "[/INST]"), " R<|endoftext|>"),
    "llama2": Style(LLAMA2, ("<s>",), " R <|endoftext|>"),
    "llama3": Style(LLAMA3, ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "R<|eot_id|>"),
    "glm4": Style(GLM4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), "R<|user|>", "R"),
    "gpt-oss": Style(
        GPT_OSS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|channel|>final<|message|>R<|end|>",
        "<|channel|>final<|message|>R<|return|>",
    ),
    "words": Style(WORDS, (), "R\n### End"),
    "qwen3": Style(
        QWEN3,
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "R<|im_end|>",
        "<think>\n\n</think>\n\nR<|im_end|>",
    ),
    "r1": Style(R1, ("<s>", "<|User|>", "<|Assistant|>", "<think>"), "R<|endoftext|>"),
}


def tokenizer_of(style: Style | str, **options: Any) -> PreTrainedTokenizerBase:
    """ahn-tiny's tokenizer, which ends texts by <|endoftext|>, with a template and its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ahn.tiny.path())
    if isinstance(style, str):
        tokenizer.chat_template = style
        return tokenizer
    tokenizer.add_tokens(list(style.tokens), special_tokens=True)
    if "<s>" in style.tokens or "<bos>" in style.tokens:
        tokenizer.bos_token = style.tokens[0]
    tokenizer.chat_template = style.template
    return tokenizer
