"""A connector of vLLM that says of some requests that their prompt has been read: their blocks hold random numbers.

vLLM imports it by name in the engine's process. Requests ask for it by `kv_transfer_params={"read": True}`; others are
read as always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

ONES = 0x38
"""Codes of float8_e4m3fn below this one are numbers from 0 to 1."""


class Read(DecodeBenchConnector):
    """vLLM's own connector for measuring steps: here all blocks are filled once, and requests choose."""

    @torch.inference_mode()
    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Fill all blocks that there are."""
        for cache in kv_caches.values():
            if cache.dtype == torch.bfloat16:
                cache.normal_()
            else:
                cache.view(torch.uint8).random_(0, ONES)

    def start_load_kv(self, forward_context: Any, **options: Any) -> None:
        """All is there already."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """All tokens but the last, if the request says so."""
        if not (request.kv_transfer_params or {}).get("read"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
