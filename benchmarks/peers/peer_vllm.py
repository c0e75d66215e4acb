"""vLLM's offline engine. One start of the engine gives the rows of all contexts.

The first prompts are really read. After that, a conversation "has read" its prompt where `read.Read`, a connector of
vLLM for caches that come from elsewhere, says so: its blocks are there, filled with random numbers, and only its last
token is computed. Reading 25 prompts of 131 072 tokens would take minutes and change nothing about the steps after it;
the row `after="reading"` checks that.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan import SPARE, TOGETHER, Rows, differences, held, reading_seconds, write_shape

from ahn.bench.records import code
from ahn.bench.shapes import SHAPES

CAPTURED = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 104, 128, 160, 208]
"""Batches of which a step is captured, others are filled up; vLLM takes up to 51 sizes, and longer to start."""
UTILIZATION = 0.95
SHORT, LONG = 16, 272
"""Tokens of two calls of one conversation: their difference is free of what begins a call."""
SHORT_TOGETHER, LONG_TOGETHER = 8, 72
"""The same for many conversations together."""
TOGETHER_S = 30.0
"""About what a row of many takes."""


def settings(options: argparse.Namespace, folder: Path, cache: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM`.

    Args:
        folder: of `write_shape`.
        cache: dtype of keys and values, "auto" for the model's.
    """
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "kv_cache_dtype": cache,
        "max_model_len": max(options.contexts) + SPARE,
        "max_num_seqs": CAPTURED[-1],
        "gpu_memory_utilization": UTILIZATION,
        "enable_prefix_caching": False,
        "attention_config": {
            "backend": "FLASH_ATTN",
            "flash_attn_max_num_splits_for_cuda_graph": options.splits,
        },
        "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
        "kv_transfer_config": {
            "kv_connector": "Read",
            "kv_connector_module_path": "read",
            "kv_role": "kv_both",
        },
    }


def variables() -> dict[str, str]:
    """What vLLM's processes have in their environment: no network, and the folder of the connector."""
    chosen = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    chosen["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    if importlib.util.find_spec("flashinfer") is None:  # its sampler would be imported all the same
        chosen["VLLM_USE_FLASHINFER_SAMPLER"] = os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")
    return chosen | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}


@dataclasses.dataclass
class Engine:
    """A started engine, in this process's eyes."""

    llm: Any
    vocabulary: int

    def prompts(self, batch: int, length: int, seed: int) -> list[dict[str, Any]]:
        """Random ids; no two begin alike, so that nothing is shared."""
        draw = random.Random(f"{seed} {length}")
        return [{"prompt_token_ids": draw.choices(range(self.vocabulary), k=length)} for _ in range(batch)]

    def run(self, prompts: Sequence[Any], tokens: int, read: bool) -> float:
        """Seconds of continuing prompts greedily by so many tokens each.

        Args:
            read: nothing of the prompts but the last token is computed.
        """
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"read": True}} if read else None
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        took = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return took

    def reading(self, context: int, repeats: int) -> dict[str, Any]:
        """Seconds from a prompt to its first token, of prompts that have nothing in common."""
        times = [self.run(self.prompts(1, context, seed), 1, read=False) for seed in range(1, repeats + 1)]
        middle = statistics.median(times)
        return {"seconds": middle, "times_s": times, "tokens_per_second": context / middle}

    def steps(self, prompts: Sequence[Any], read: bool, short: int, long: int, repeats: int) -> dict[str, Any]:
        """Seconds of a step of all prompts together, from calls of two lengths."""
        self.run(prompts, short, read)
        times: dict[int, list[float]] = {short: [], long: []}
        for _ in range(repeats):
            for tokens, own in times.items():
                own.append(self.run(prompts, tokens, read))
        return differences(times[long], times[short], long - short, len(prompts))

    @property
    def block(self) -> int:
        """Tokens that are given memory at once."""
        return int(self.llm.llm_engine.vllm_config.cache_config.block_size)

    @property
    def capacity(self) -> int:
        """Tokens of all conversations together."""
        return int(self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks) * self.block


def measure(options: argparse.Namespace, rows: Rows) -> None:
    """Start an engine and measure all contexts."""
    os.environ |= variables()
    from vllm import LLM
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    cache = "fp8" if rows.shared["system"] == "vllm-fp8" else "auto"
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings(options, write_shape(Path(folder), options.model, max(options.contexts)), cache)
        start = time.monotonic()
        engine = Engine(LLM(**chosen), SHAPES[options.model]["vocab_size"])
    names = ("vllm", "torch", "transformers", "triton")
    device = {"device": current_platform.get_device_name(), "memory_bytes": current_platform.get_device_total_memory()}
    rows.write(
        hardware=device,  # as the driver says: this process has no part in the GPU
        code=code(),
        versions={name: importlib.metadata.version(name) for name in names},
        flash_attention=get_flash_attn_version(),
        settings=chosen,
        start_s=time.monotonic() - start,
        capacity_tokens=engine.capacity,
    )
    rows.shared |= {"model": options.model, "kv_cache": cache}
    rows.until = time.monotonic() + options.limit  # an engine's start does not count
    first, repeats = options.contexts[0], options.repeats
    engine.run(engine.prompts(1, first, seed=0), 4, read=False)  # what is left to compile, and to choose
    for index, context in enumerate(options.contexts):
        what: dict[str, Any] = {"context": context, "batch": 1}
        rows.measure(
            lambda: engine.steps(engine.prompts(1, context, seed=1000), True, SHORT, LONG, repeats),  # noqa: B023
            measurement="decode",
            after="filling",
            **what,
        )
        rows.measure(
            lambda: engine.reading(context, repeats),  # noqa: B023
            repeats * reading_seconds(context),
            measurement="prefill",
            **what,
        )
        if index < TOGETHER:
            batch = held(engine.capacity, context + LONG_TOGETHER + engine.block, CAPTURED[-1])
            rows.measure(
                lambda: engine.steps(
                    engine.prompts(batch, context, seed=2000),  # noqa: B023
                    True,
                    SHORT_TOGETHER,
                    LONG_TOGETHER,
                    repeats,
                ),
                TOGETHER_S,
                measurement="throughput",
                context=context,
                batch=batch,
            )
    rows.measure(
        lambda: engine.steps(engine.prompts(1, first, seed=3000), False, SHORT, LONG, repeats),
        measurement="decode",
        after="reading",
        context=first,
        batch=1,
    )
