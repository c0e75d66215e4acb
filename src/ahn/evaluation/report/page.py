"""One HTML page that needs no other file and no network."""

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d242b; background: #f4f5f7; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 8px 0 4px; } h2 { font-size: 18px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 20px 24px; margin: 18px 0; }
p { color: #5b6470; margin: 10px 0 0; max-width: 90ch; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; text-align: left; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
th { border-bottom: 2px solid #9aa3ad; font-weight: 600; white-space: normal; vertical-align: bottom; }
.number { text-align: right; }
tr.quoted td { color: #5b6470; font-style: italic; background: #fafbfc; }
pre.gradients { white-space: pre-wrap; font-size: 13px; line-height: 1.6; margin: 0; overflow-wrap: anywhere; }
pre.gradients .window, pre.gradients .sink { color: #9aa3ad; }
"""


def page(title: str, introduction: str, sections: Sequence[str]) -> str:
    """The whole page."""
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>{html.escape(title)}</h1>
<p>{html.escape(introduction)}</p>
{body}
</main></body>
</html>
"""


def image(png: bytes, text: str) -> str:
    """A picture that is part of the page; `text` says what it shows to those who do not see it."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(text, quote=True)}" src="data:image/png;base64,{data}">'
