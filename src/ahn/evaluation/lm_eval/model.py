"""The harness's model class for a model with a memory, or one of its baselines."""

from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ahn.config import Reach
from ahn.evaluation import methods

UNLIMITED = 1 << 20
"""Tokens of a prompt: a memory reads any length, so only full attention stops where the model's configuration says."""


@register_model("ahn")
class AHNLM(HFLM):
    """`--model ahn`.

    The harness cuts what is longer than `max_length` off the left of the finished prompt, chat template and all. It
    would take that limit from the base model's configuration, and so evaluate a window that is never left.

    Args (of `--model_args`):
        pretrained: base model, merged checkpoint or adapter: a directory or a Hub id.
        adapter: a directory or a Hub id.
        method: ahn, window, full, ct-max or ct-avg.
        window, sinks, quantized: None takes the adapter's.
        max_length: tokens of prompt and answer.
        device, dtype, batch_size and what else `HFLM` knows of a loaded model.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        method: str = "ahn",
        window: int | None = None,
        sinks: int | None = None,
        quantized: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        accelerator = Accelerator()
        several = accelerator.num_processes > 1
        if several:
            device = str(accelerator.device)
        elif device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's default
        chosen = None if dtype == "auto" else dtype
        reach: Reach = {"window": window, "sinks": sinks, "quantized": quantized}
        evaluated = methods.load(method, pretrained, adapter, device, chosen, **reach)
        if max_length is None and method != "full":
            max_length = UNLIMITED
        super().__init__(evaluated.model, tokenizer=evaluated.tokenizer, max_length=max_length, **options)
        self.settings = evaluated.settings | evaluated.about
        if several:  # HFLM leaves this to whoever brings a loaded model
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the scores."""
        return super().get_model_info() | {"ahn": self.settings}
