"""Whole runs of `ahn train` in milliseconds a step: a random two-layer model, random words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import ahn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("def", "class", "return", "import", "os", "self", "x1", "=", "(", ")")


def write_model(path: Path) -> Path:
    """A random Qwen3 with ahn-tiny's tokenizer and a chat template."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(ahn.tiny.path())
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    return path


def words(number: int, seed: int) -> str:
    """Random text of about this many words, one or two tokens each."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(number))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(model: Path, data: Path, output: Path, **others: Any) -> list[str]:
    """A run of four steps on samples of different lengths; `others` wins."""
    chosen = {
        "model_name_or_path": model, "dataset": data, "output_dir": output, "cutoff_len": 128, "filter_len": 34,
        "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True,
        "plot_loss": False, "preprocessing_num_workers": 1, "disable_tqdm": True,
    }  # fmt: skip
    chosen |= others
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


PUBLISHED = """
    --model_name_or_path Qwen/Qwen2.5-3B-Instruct --stage sft --finetuning_type freeze --freeze_extra_modules ahn
    --loss_type kl --use_normalized_l2 True --do_train --use_fast_tokenizer --flash_attn fa2 --sliding_window 256
    --sliding_window_type random --ahn_position random --layer_implementation Qwen2MemDecoderLayer
    --ahn_implementation GatedDeltaNet --dataset chatqa2 --template qwen --filter_len 288 --cutoff_len 24576
    --max_samples 100000 --overwrite_cache false --overwrite_output_dir false --preprocessing_num_workers 16
    --output_dir ./ckpt --save_ahn_only True --logging_steps 1 --save_steps 500 --plot_loss
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 1e-4 --num_train_epochs 1
    --lr_scheduler_type cosine --warmup_ratio 0.1 --weight_decay 0.1 --bf16 true --run_name gdn
    --ddp_timeout 180000000
"""
