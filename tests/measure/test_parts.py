"""Templates that show messages in parts alone get them so, whatever puts a message into a template."""

from __future__ import annotations

from transformers import AutoTokenizer

from ahn import tiny
from ahn.measure.parts import as_shown, render, wants_parts

PART = "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"
PARTS = f"{{% for m in messages %}}{PART}{{% endfor %}}"
BOTH = (
    f"{{% for m in messages %}}{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{PART}{{% endif %}}"
    "{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m.content.strip() }}{% endfor %}"
NOTHING = "{% for m in messages %}{{ m.role }}{% endfor %}"


def test_a_message_is_given_in_the_form_that_is_shown() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    for template, expected in ((PARTS, "[hello][hi]"), (BOTH, "hellohi"), (STRINGS, "hellohi")):
        tokenizer.chat_template = template
        assert render(tokenizer, talk, ask=False) == expected
        assert wants_parts(tokenizer) == (template == PARTS)
    tokenizer.chat_template = NOTHING
    assert as_shown(tokenizer, talk) == talk
    tokenizer.chat_template = PARTS
    assert as_shown(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])[0]["content"] == [{"type": "image"}]
