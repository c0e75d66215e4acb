"""Speeds in documents, ours and others', are those of the committed rows.

Each test writes the lines of a table, or the sentences that hold the numbers, from the rows, and looks for them in the
document. So a number that is changed in either place fails. What has no row stands in the line as it is.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from support.results import document, measured, rows

SHORT, MEDIUM, LONG = 8192, 32768, 131072
"""Tokens of context."""
PEERS, OLDER, NEWEST, H100 = (
    "h200-peers.jsonl",
    "h200-bench.jsonl",
    "h200-bench-2026-12-01.jsonl",
    "h100-bench.jsonl",
)
SHAPE = {"model": "qwen2.5-3b", "window": 32640, "quantized": 0, "context": LONG}
"""Of the rows of `ahn bench` that the pages' tables show."""


def peer(measurement: str, context: int, **which: Any) -> dict[str, Any]:
    """The newest row of `benchmarks/peers`; `which` tells whose it is."""
    return measured(PEERS, measurement=measurement, context=context, **which)


OURS, VLLM, FP8 = {"method": "gated_deltanet"}, {"kv_cache": "auto"}, {"kv_cache": "fp8"}
READ, STEP, MANY = (peer(kind, LONG, **OURS) for kind in ("prefill", "decode", "throughput"))
VLLM_READ, VLLM_STEP, VLLM_MANY = (peer(kind, LONG, **VLLM) for kind in ("prefill", "decode", "throughput"))
FP8_READ, FP8_STEP, FP8_MANY = (peer(kind, LONG, **FP8) for kind in ("prefill", "decode", "throughput"))
FULL = {"method": "full-dynamic", "context": LONG, "status": "ok"}
FULL_READ = measured(OLDER, measurement="prefill", **FULL)
FULL_STEP = measured(OLDER, measurement="throughput", batch=1, **FULL)
FULL_MANY = measured(OLDER, measurement="throughput", **FULL)
"""The most conversations that fit: the last row before the one that runs out of memory."""


def served(part: str, context: int, server: str | None = None) -> dict[str, Any]:
    """The newest row of `benchmarks/serving`; `server` is None for `ahn serve`."""
    return measured("h200-serving.jsonl", part=part, context=context, server=server)


VLLM_SERVED = [served("throughput", context, "vllm 0.25.1") for context in (SHORT, MEDIUM, LONG)]


def fixed(number: float, digits: int = 0) -> str:
    """A number as documents write it: halves are rounded up, and blanks separate thousands."""
    rounded = Decimal(repr(number)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded:,}".replace(",", " ")


def s(row: dict[str, Any], digits: int = 2, field: str = "seconds") -> str:
    return f"{fixed(row[field], digits)} s"


def ms(row: dict[str, Any], digits: int = 2, field: str = "seconds") -> str:
    return fixed(1000 * row[field], digits)


def share(row: dict[str, Any]) -> str:
    return f"{fixed(100 * row['share'])} %"


def peak(row: dict[str, Any]) -> str:
    gigabytes = row["peak_bytes"] / 1e9
    return f"{fixed(gigabytes, 1 if gigabytes < 100 else 0)} GB"


def rate(row: dict[str, Any]) -> str:
    """Tokens per second, without the unit."""
    return fixed(row["tokens_per_second"])


def bare(row: dict[str, Any]) -> str:
    """The rate of the server's batch without the server."""
    return fixed(row["batch_tokens_per_second"])


def shows(name: str, *parts: str) -> None:
    text = document(name)
    assert not [part for part in parts if part not in text]


def test_readme() -> None:
    server = served("throughput", LONG)
    at_32k, at_8k = peer("throughput", MEDIUM, **VLLM), VLLM_SERVED[0]
    shows(
        "README.md",
        f"| reading them | {s(READ, 1)} | {s(VLLM_READ, 1)} | {s(FP8_READ, 1)} | {s(FULL_READ, 1)} |",
        f"| a token, through `generate` | {ms(STEP, field='generate_s')} ms (a step alone: {ms(STEP)}",
        f"| {ms(VLLM_STEP)} ms | {ms(FP8_STEP)} ms | {ms(FULL_STEP, 0)} ms;",
        f"| conversations together | {MANY['batch']}: {rate(MANY)} tokens/s "
        f"| {VLLM_MANY['batch']}: {rate(VLLM_MANY)} tokens/s | {FP8_MANY['batch']}: {rate(FP8_MANY)} tokens/s "
        f"| {FULL_MANY['batch']}: {rate(FULL_MANY)} tokens/s |",
        f"The peak of memory is {peak(READ)}; transformers needs {peak(FULL_READ)}.",
        f"({rate(at_32k)} tokens/s for {at_32k['batch']} conversations; "
        f"{rate(at_8k)} for {at_8k['conversations']} of 8k tokens)",
        f"{server['conversations']} conversations of {fixed(LONG)} tokens together write {rate(server)} tokens per "
        f"second through HTTP. That is {100 * server['tokens_per_second'] / server['batch_tokens_per_second']:.0f} %",
        f"begins after {s(served('second_turn', LONG), field='device_s')}",
        f"trains at {rate(measured(H100, measurement='train', model='qwen2.5-7b'))} tokens per second on an H100",
    )


def test_first_table_of_performance() -> None:
    wanted = SHAPE | {"measurement": "decode", "method": "gated_deltanet"}
    h100 = min((row for row in rows(H100) if wanted.items() <= row.items()), key=lambda row: row["seconds"])
    h100_read = measured(H100, measurement="prefill", method="gated_deltanet", **SHAPE)
    shows(
        "docs/performance.md",
        f"| reading the context | {s(READ)}, {share(READ)} of the limit | {s(h100_read)} | {s(VLLM_READ)} "
        f"| {s(FP8_READ)} | {s(FULL_READ)} |",
        f"| writing one token | {ms(STEP)} ms, {share(STEP)} of the limit; through `generate` "
        f"{ms(STEP, field='generate_s')} | {ms(h100)} ms, {share(h100)} | {ms(VLLM_STEP)} ms | {ms(FP8_STEP)} ms "
        f"| {ms(FULL_STEP, 0)} ms;",
        f"| peak memory | {peak(READ)} | {peak(h100)} (writing) | all there is | all there is | {peak(FULL_READ)} |",
        f"| conversations together | {MANY['batch']}: {rate(MANY)} tokens/s | "
        f"| {VLLM_MANY['batch']} fit: {rate(VLLM_MANY)} tokens/s | {FP8_MANY['batch']} fit: {rate(FP8_MANY)} tokens/s "
        f"| {FULL_MANY['batch']} fit: {rate(FULL_MANY)} tokens/s |",
    )


def test_where_the_numbers_of_performance_are_from() -> None:
    ours = OURS | {"measurement": "prefill", "context": LONG}
    before = next(row for row in rows(PEERS) if ours.items() <= row.items())
    full = {"system": "transformers", "measurement": "decode", "context": LONG}
    first, again = (row for row in rows(PEERS) if full.items() <= row.items())
    at_32k = peer("decode", MEDIUM, **OURS)
    more = [100 * (row["generate_s"] / row["seconds"] - 1) for row in (STEP, at_32k)]
    shows(
        "docs/performance.md",
        f"The run before it had {s(before)} ({share(before)})",
        f"a token took {ms(first, 0)} ms, and {ms(again, 0)} ms where",
        f"a token takes {more[0]:.0f} % more than a step after 128k, and {more[1]:.1f} % more after 32k "
        f"({ms(at_32k, field='generate_s')} ms)",
    )


def test_texts_that_fit_in_performance() -> None:
    theirs, ours, at_8k = peer("throughput", MEDIUM, **VLLM), peer("throughput", MEDIUM, **OURS), VLLM_SERVED[0]
    shows(
        "docs/performance.md",
        f"reads them in {s(peer('prefill', MEDIUM, **VLLM))} (ours {s(peer('prefill', MEDIUM, **OURS))}) and writes "
        f"{rate(theirs)} tokens/s for {theirs['batch']} conversations (ours {rate(ours)} for {ours['batch']})",
        f"holds {at_8k['conversations']} conversations and writes {rate(at_8k)} tokens/s",
        f"takes {ms(peer('decode', MEDIUM, **VLLM), 1)} ms there, ours {ms(peer('decode', MEDIUM, **OURS))}.",
    )


def test_comparison() -> None:
    theirs, ours, at_8k = peer("throughput", MEDIUM, **VLLM), peer("throughput", MEDIUM, **OURS), VLLM_SERVED[0]
    shows(
        "docs/comparison.md",
        f"| reading | {s(FULL_READ)} | {s(READ)} |",
        f"| a token | {ms(FULL_STEP, 0)} ms with a dynamic cache | {ms(STEP)} ms (a step alone; through `generate` "
        f"{ms(STEP, field='generate_s')}) |",
        f"| peak memory | {peak(FULL_READ)} | {peak(READ)} |",
        f"| conversations together | {FULL_MANY['batch']}, {rate(FULL_MANY)} tokens/s "
        f"| {MANY['batch']}, {rate(MANY)} tokens/s |",
        f"vLLM takes [{ms(VLLM_STEP)} ms](performance.md)",
        f"At 32k tokens it wrote {rate(theirs)} tokens/s for {theirs['batch']} conversations",
        f"A memory wrote {rate(ours)} for {ours['batch']}. At 8k tokens it wrote {rate(at_8k)} for "
        f"{at_8k['conversations']}, through HTTP",
        f"At 128k tokens vLLM held {VLLM_MANY['batch']} conversations and wrote {rate(VLLM_MANY)} tokens/s, with an "
        f"8-bit cache {FP8_MANY['batch']} and {rate(FP8_MANY)}. A memory wrote {rate(MANY)} for {MANY['batch']} again",
    )


def test_ahn_serve() -> None:
    many, turn, pace, read = (served(part, LONG) for part in ("throughput", "second_turn", "pace", "read"))
    alone, others, first = pace["alone"], pace["while_others_read"], read["first_token_s"]
    anew = [row["read_anew_s"] for row in rows("h200-serving.jsonl") if "device_s" in row]
    shows(
        "docs/serving.md",
        f"| {many['conversations']} conversations together, forks of one document | {rate(many)} tokens per second, "
        f"{100 * many['tokens_per_second'] / many['batch_tokens_per_second']:.0f} % of bare steps of the same batch "
        f"({bare(many)}) |",
        f"| {s(turn, field='device_s')} with the state on the GPU, {fixed(turn['memory_s'], 2)} in the CPU's memory, "
        f"{fixed(turn['disk_s'], 2)} in a file that the system holds, {fixed(turn['cold_s'], 1)} in one that it does "
        "not |",
        f"| {s(first, 1, str(LONG))}: the text is read anew ({fixed(min(anew), 1)} to {fixed(max(anew), 1)} s while",
        f"| {ms(alone, 1, 'median_s')} ms; {ms(others, 1, 'median_s')} while others' texts are read, one in a hundred "
        f"more than {ms(others, 1, 'p99_s')} |",
        f"read while one reply is written | {s(pace, 1, 'text_read_s')} |",
        f"| a text of 512 tokens | {s(first, 2, '512')} to the first token",
    )


def test_vllms_server() -> None:
    ours = served("throughput", LONG)
    short, medium, long = (served("second_turn", context, "vllm 0.25.1") for context in (SHORT, MEDIUM, LONG))
    at_8k, at_32k, at_128k = (row["tokens_per_second"] / ours["tokens_per_second"] for row in VLLM_SERVED)
    anew = [s(short, 2, "read_anew_s"), s(medium, 2, "read_anew_s"), s(long, 1, "read_anew_s")]
    kept = [s(row, 2, "kept_s") for row in (short, medium, long)]
    shows(
        "docs/serving.md",
        f"| conversations that it has room for | {' | '.join(str(row['conversations']) for row in VLLM_SERVED)} |",
        f"| tokens per second of them together | {' | '.join(map(rate, VLLM_SERVED))} |",
        f"| first token of a text that is read anew | {' | '.join(anew)} |",
        f"| first token of a second turn, from its prefix cache | {' | '.join(kept)} |",
        f"vLLM writes {fixed(at_8k, 1)} times as many tokens per second at 8k tokens and {fixed(at_32k, 1)} times as "
        "many at 32k",
        f"At 128k tokens `ahn serve` holds {ours['conversations']} conversations in place of "
        f"{VLLM_SERVED[-1]['conversations']} and writes {fixed(1 / at_128k, 1)} times as many tokens per second",
    )
    turn = ms(served("second_turn", LONG), 0, "device_s")
    short, medium, long = (ms(row, 0, "kept_s") for row in (short, medium, long))
    shows(
        "docs/serving.md",
        f"A second turn after 128k tokens begins after {turn} ms, with vLLM after {long}",
        f"vLLM takes {medium} ms (32k) and {short} ms (8k)",
    )
    shows(
        "docs/comparison.md",
        f"begins after {turn} ms with `ahn serve` and after {long} ms with vLLM",
        f"vLLM takes {medium} ms (32k) and {short} ms (8k)",
    )


def test_second_turns_in_the_log() -> None:
    """The five versions, oldest first, and where the time of the last one goes."""
    first, steps, several, quicker, parts = (row for row in rows("h200-serving.jsonl") if "device_s" in row)
    by_steps = [ms(row, 0, "device_by_steps_s") for row in (several, quicker, parts)]
    device = [ms(row, 0, "device_s") for row in (first, steps, several, quicker, parts)]
    of_file = [ms({"seconds": row["disk_s"] - row["memory_s"]}, 0) for row in (first, steps, several, quicker, parts)]

    def after(place: str) -> str:
        three = ", ".join(fixed(1000 * seconds) for seconds in parts[f"{place}_times_s"])
        return f"{ms(parts, 0, f'{place}_s')} ({three})"

    shows(
        "docs/log.md",
        f"| {device[0]} ms | {device[1]} ms (wanted: 60) |",
        f"| 65 ms | {device[1]} ms |",
        f"| 120 ms | {device[2]} ms ({by_steps[0]} with a step for each token) |",
        f"| {device[3]} ms ({by_steps[1]} with a step for each token) |",
        f"| 39 ms (30 to 48) | {device[4]} ms ({by_steps[2]} with a step for each token) |",
        f"| on the GPU | {device[3]} | 39 (30 to 48) | {after('device')} | 60 |",
        f"| on the GPU, a step for each token | {by_steps[1]} | | {after('device_by_steps')} | |",
        f"| in the CPU's memory | {ms(quicker, 0, 'memory_s')} | 210 | {after('memory')} | |",
        f"| in a file that the system holds | {ms(quicker, 0, 'disk_s')} | 305 | {after('disk')} | 400 |",
        f"| in a file that it does not hold | {ms(quicker, 0, 'cold_s')} | | {after('cold')} | |",
        f"adds {of_file[4]} ms",
        f"it added {of_file[0]}, {of_file[1]}, {of_file[2]} and {of_file[3]}",
    )


def test_vllm_in_the_log() -> None:
    """What `All four in one run` and `vLLM's server, through HTTP` measured; predictions stand in the lines."""
    turns = [served("second_turn", context, "vllm 0.25.1") for context in (SHORT, MEDIUM, LONG)]
    reads, steps = ([peer(kind, n, **VLLM) for n in (MEDIUM, LONG)] for kind in ("prefill", "decode"))
    fp8_steps = [measured(PEERS, measurement="decode", context=n, after="filling", **FP8) for n in (MEDIUM, LONG)]
    fp8_many = peer("throughput", MEDIUM, **FP8)
    steps[0] = measured(PEERS, measurement="decode", context=MEDIUM, after="filling", **VLLM)
    shows(
        "docs/log.md",
        f"| vLLM, reading 32k, 128k | 0.60, 5.29 s | {fixed(reads[0]['seconds'], 2)}, {s(reads[1])} |",
        f"| vLLM, a token at 32k, 128k | 3.3, 4.1 ms | {ms(steps[0])}, {ms(steps[1])} ms |",
        f"| vLLM, together at 32k | 111: 4 361 tokens/s | 111: {rate(peer('throughput', MEDIUM, **VLLM))} |",
        f"208: 3 560 | {s(peer('prefill', MEDIUM, **FP8))}; {ms(fp8_steps[0])}, {ms(fp8_steps[1])} ms; "
        f"208: {rate(fp8_many)} |",
        "| conversations held | 431; {} | 110; {} | 27; {} |".format(*(row["conversations"] for row in VLLM_SERVED)),
        "| tokens/s together | 6 500; {} | 3 500; {} | 640; {} |".format(*map(rate, VLLM_SERVED)),
        "| first token of a second turn | 20; {} ms | 35; {} ms | 110; {} ms |".format(
            *(ms(row, 0, "kept_s") for row in turns)
        ),
    )


def test_serving_on_a_cpu() -> None:
    questions = ("throughput", "second_turn", "pace")
    many, turn, pace = (measured("cpu-serving.jsonl", question=question) for question in questions)
    alone, others = pace["alone"], pace["while_others_read"]
    shows(
        "docs/serving.md",
        f"| {rate(many)} tokens per second; bare steps of the same batch: {bare(many)} |",
        f"| {s(turn, field='memory_s')} with the state in memory, {s(turn, field='disk_s')} from disk, "
        f"{s(turn, field='not_kept_s')} read anew |",
        f"| {ms(alone, 0, 'median_s')} ms, one in a hundred more than {ms(alone, 0, 'p99_s')} |",
        f"| {ms(others, 0, 'median_s')} ms, one in a hundred more than {ms(others, 0, 'p99_s')} |",
    )


@pytest.mark.parametrize(
    ("name", "method", "file"),
    [
        ("full attention (transformers, dynamic cache)", "full-dynamic", OLDER),
        ("sinks + window", "window", NEWEST),
        ("DeltaNet", "deltanet", OLDER),
        ("Mamba2", "mamba2", OLDER),
        ("Routed DeltaNet", "routed_deltanet", NEWEST),
    ],
)
def test_reading_in_performance(name: str, method: str, file: str) -> None:
    row = measured(file, measurement="prefill", context=LONG, method=method)
    shows("docs/performance.md", f"| {name} | 128k | {s(row)} | {share(row)} | {peak(row)} |")


@pytest.mark.parametrize(
    ("name", "method", "run_on_h100"),
    [
        ("sinks + window", "window", "20261127T202820-502"),
        ("DeltaNet", "deltanet", "20261127T202820-502"),
        ("Mamba2", "mamba2", "20261127T202820-502"),
        ("Routed DeltaNet (eight states per key head)", "routed_deltanet", "20261128T033036-7797"),
    ],
)
def test_a_token_in_performance(name: str, method: str, run_on_h100: str) -> None:
    own = SHAPE | {"measurement": "decode", "method": method}
    row, h100 = measured(NEWEST, batch=1, **own), measured(H100, run=run_on_h100, **own)
    line = f"{ms(row)} | {share(row)} | {ms(row, field='generate_s')} | {ms(h100)} | {share(h100)}"
    shows("docs/performance.md", f"| {name} | {line} |")


def test_a_token_with_a_tier() -> None:
    for name, method in (("sinks + window", "window"), ("Gated DeltaNet", "gated_deltanet")):
        row = measured(NEWEST, measurement="decode", method=method, quantized=57344)
        line = f"{ms(row)} | {share(row)} | {ms(row, field='generate_s')}"
        shows("docs/performance.md", f"| {name}, 4 and 2 bits, keys before RoPE | {line} |")
    row = measured(NEWEST, measurement="decode", method="window", quantized=57344)
    alone = measured(NEWEST, measurement="decode", batch=1, method="window", **SHAPE)
    shows("docs/choose.md", f"a token takes {ms(row)} ms with 57 344 such tokens", f"and {ms(alone)} ms with a window")


def test_conversations_that_decode_together() -> None:
    """Ours and full attention's: tokens per second, milliseconds per step, the share of the limit, the peak."""
    lines = [f"| 100 | {rate(MANY)} | {ms(MANY)} | {share(MANY)} | "]
    for batch in (1, 4, 8, 16, 32, 64):
        kind = "throughput" if batch > 16 else "decode"
        row = measured(NEWEST, measurement=kind, batch=batch, method="gated_deltanet", **SHAPE)
        lines.append(f"| {batch} | {rate(row)} | {ms(row)} | {share(row)} | {peak(row)} |")
    for batch in (1, 4, 8, 16, 24):
        row = measured(OLDER, measurement="throughput", batch=batch, **FULL)
        lines.append(f"| {batch} | {rate(row)} | {ms(row, 1)} | {share(row)} | {peak(row)} |")
    shows("docs/performance.md", *lines)


def test_gated_deltanet_in_performance() -> None:
    """Its lines of the tables, which name several runs, and its other windows, lengths and models."""
    own = {"method": "gated_deltanet"}
    steps = sorted(ms(measured(file, measurement="decode", batch=1, **own, context=LONG)) for file in (PEERS, NEWEST))
    h100 = measured(H100, run="20261127T202820-502", **own)
    other = measured(NEWEST, measurement="prefill", **own)
    far = measured(OLDER, measurement="memory", context=8 * LONG, **own)
    short = measured(OLDER, measurement="prefill", window=8064, **own)
    larger = measured(OLDER, measurement="prefill", model="qwen2.5-7b", **own)
    models = [measured(H100, measurement="decode", model=model, **own) for model in ("qwen3-4b", "qwen2.5-7b")]
    with_tier = [measured(H100, quantized=57344, method=method) for method in ("window", "gated_deltanet")]
    shows(
        "docs/performance.md",
        f"; {fixed(other['seconds'], 2)} and {fixed(READ['seconds'], 2)} in other runs",
        f"| {steps[0]} to {steps[1]} | {share(STEP)} | {ms(STEP, field='generate_s')} | {ms(h100)} | {share(h100)} |",
        f"| Gated DeltaNet | 1M | {s(far, 1, 'prefill_s')}, once, compiling included | | {peak(far)} |",
        f"| Gated DeltaNet, window 8 064 | 128k | {s(short)} (spread 6 %) | {share(short)} | {peak(short)} |",
        f"| Qwen2.5-7B, Gated DeltaNet | 128k | {s(larger)} | {share(larger)} | {peak(larger)} |",
        f" | {ms(models[0])} | {ms(models[1])} | ",
        f" | {share(models[0])} | {share(models[1])} | ",
        f"| sinks + window, two bits | | | | {ms(with_tier[0])} | {share(with_tier[0])} |",
        f"| Gated DeltaNet, two bits | | | | {ms(with_tier[1])};",
    )


def test_reading_on_a_cpu() -> None:
    """Tokens per second of the processor: the first two rows are of the version before."""
    before_retained, before_window, tier, full, window, retained = (
        fixed(row["context"] / row["cpu_s"]) for row in rows("cpu-reading.jsonl") if "cpu_s" in row
    )
    shows(
        "docs/performance.md",
        f"| sinks + window, 32 + 480 tokens | {before_window} | {window} |",
        f"| + 2 048 tokens at 4 and 2 bits | | {tier} |",
        f"| + 2 048 retained tokens, the memory that ships | {before_retained} | {retained} |",
        f"| full attention, transformers | | {full} |",
    )


def test_guessing_on_a_cpu() -> None:
    for name, text in (("a piece of code with a name changed", "edit"), ("a quote", "quote"), ("a story", "story")):
        plain, five, ten = (measured("cpu-speculation.jsonl", text=text, lookup=lookup) for lookup in (0, 5, 10))
        times = f"{fixed(five['times_plain'], 2)} × | {fixed(ten['times_plain'], 2)} ×"
        tokens = fixed(ten["new_tokens"] / ten["forwards"], 1)
        shows("docs/performance.md", f"| {name} | {fixed(plain['tokens_per_second'], 1)} | {times} | {tokens} |")


def test_training() -> None:
    for name, model, method in (
        ("7B, Gated DeltaNet", "qwen2.5-7b", "gated_deltanet"),
        ("3B, Gated DeltaNet", "qwen2.5-3b", "gated_deltanet"),
        ("3B, DeltaNet", "qwen2.5-3b", "deltanet"),
        ("3B, Mamba2 (the day after)", "qwen2.5-3b", "mamba2"),
    ):
        row = measured(H100, measurement="train", model=model, method=method)
        cells = document("docs/training.md").split(f"| {name} | ")[1].split(" | ")
        wanted = [s(row, 3), rate(row), s(row, 3, "limit_s"), share(row), peak(row)]
        assert [cell[: len(said)] for cell, said in zip(cells, wanted, strict=False)] == wanted
    eight, sixteen = (measured("h200-training.jsonl", batch=batch, method="deltanet") for batch in (8, 16))
    shows(
        "docs/training.md",
        f"trains at {fixed(round(eight['tokens_per_second'], -2))} tokens/s with 8 sequences per step "
        f"({fixed(eight['peak_bytes'] / 1e9)} GB), and at {fixed(round(sixteen['tokens_per_second'], -3))} with 16 "
        f"({fixed(sixteen['peak_bytes'] / 1e9)} GB). That is {share(eight)[:-2]} and {share(sixteen)} of the limit",
    )
    shows(
        "docs/performance.md",
        f"runs at {rate(measured(H100, measurement='train', model='qwen2.5-7b'))} tokens/s on an H100, on "
        f"SmolLM2-135M's at {fixed(round(sixteen['tokens_per_second'], -3))} on an H200",
    )


def test_training_on_two_gpus() -> None:
    one, two = (measured("h100-scaling.jsonl", run=run) for run in ("1 GPU", "2 GPUs, DDP"))
    sharded = measured("h100-scaling.jsonl", run="2 GPUs, FSDP2")
    ratio = two["tokens_per_second"] / one["tokens_per_second"]
    shows(
        "docs/training.md",
        f"| 3B, DDP | {rate(one)} | {rate(two)} | {fixed(ratio, 3)} |",
        f" | – | {rate(sharded)} | – | falls by {fixed(100 * sharded['fell_by'], 1)} % in two steps | "
        f"{fixed(sharded['peak_gib'][0] * 2**30 / 1e9, 1)} GB ({fixed(sharded['peak_gib'][0], 1)} GiB), both |",
    )
