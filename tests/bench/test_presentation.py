"""Tables and figures of rows."""

from __future__ import annotations

from typing import Any

from ahn.bench import figures, table

BASE = {"model": "small", "device": "NVIDIA H200", "dtype": "bfloat16", "status": "ok", "adapter": None}
ROOF = {"bytes": 7.4e9, "flops": 1.6e10, "limit_s": 1.75e-3, "share": 0.8, "spread": 0.01}


def decode(method: str, context: int, seconds: float, **changes: Any) -> dict[str, Any]:
    exact = {"window": None, "sinks": None} if method.startswith("full") else {"window": 32640, "sinks": 128}
    row = {"measurement": "decode", "method": method, "context": context, "batch": 1, "seconds": seconds}
    return {**BASE, **exact, **ROOF, **row, **changes}


ROWS = [
    decode("full-dynamic", 32768, 0.021, times_s=[0.02, 0.021, 0.025]),
    decode("gated_deltanet", 32768, 0.0022),
    decode("full-dynamic", 131072, 0.027),
    decode("gated_deltanet", 131072, 0.0022),
    {**decode("full-dynamic", 1 << 20, 0), "status": "out of memory", "why": "tried to allocate", "seconds": None},
]


def test_tokens_in_units() -> None:
    assert [table.tokens(n) for n in (100, 24576, 131072, 1 << 20, 128000, None)] == [
        "100",
        "24k",
        "128k",
        "1M",
        "125k",
        "",
    ]


def test_table_holds_measurement_limit_and_failure() -> None:
    text = table.text(ROWS)
    assert "small, bfloat16, NVIDIA H200" in text
    lines = [line.split() for line in text.splitlines() if "gated_deltanet" in line or "out of memory" in line]
    assert lines[0][:4] == ["32k", "1", "gated_deltanet", "128+32640"]
    assert {"2.20", "7.4", "1.750", "80"} <= set(lines[0])
    assert lines[-1][:3] == ["1M", "1", "full-dynamic"]
    assert "…" not in text  # nothing is cut off


def test_one_line_a_row() -> None:
    assert "ms/token 2.20" in table.line(ROWS[1])
    assert table.line(ROWS[-1]).endswith("out of memory: tried to allocate")


def test_length_figure_shows_methods_limits_and_where_memory_ran_out() -> None:
    drawn = figures.figures(ROWS)
    assert list(drawn) == ["length"]
    (axis,) = drawn["length"].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert curves["full-dynamic"] == [21.0, 27.0]
    assert curves["gated_deltanet"] == [2.2, 2.2]
    assert curves["limit, gated_deltanet"] == [1.75, 1.75]
    assert [text.get_text() for text in axis.texts] == ["out of memory"]
    spans = [segment.tolist() for bars in axis.collections for segment in bars.get_segments()]
    assert spans[0] == [[32768, 20.0], [32768, 25.0]], "fastest and slowest run"
    assert "bars: fastest to slowest run" in [text.get_text() for text in drawn["length"].legends[0].get_texts()]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["32k", "128k"]


def test_throughput_figure_takes_the_longest_context() -> None:
    rows = [
        decode("mamba2", context, 0.01, measurement="throughput", batch=batch, tokens_per_second=rate, peak_bytes=2e10)
        for context, batch, rate in ((100, 1, 5.0), (200, 1, 3.0), (200, 8, 20.0))
    ]
    drawn = figures.figures(rows)
    assert list(drawn) == ["throughput"]
    rate, peak = drawn["throughput"].axes
    assert [list(line.get_ydata()) for line in rate.get_lines()] == [[3.0, 20.0]]
    assert [list(line.get_ydata()) for line in peak.get_lines()] == [[20.0, 20.0]]


def test_models_have_figures_of_their_own() -> None:
    assert len(figures.figures([*ROWS, {**ROWS[0], "model": "other"}])) == 2
