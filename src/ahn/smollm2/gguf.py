"""From a GGUF file of SmolLM2 to the directory that transformers reads: weights, tokenizer, chat template.

transformers can load the file itself (`gguf_file=`), but takes minutes for it each time and keeps a quantised model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ahn.errors import AHNError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedTokenizerBase

DTYPE = torch.bfloat16
"""What the published weights have, and what the converted ones are rounded to."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls a tensor of a Llama model, and what transformers calls it."""
CONTROL = 3
"""Kind of a token in GGUF that is never a part of a text."""


def convert(file: Path, directory: Path, advance: Callable[[int], Any] = lambda number: None) -> None:
    """Write the model that a GGUF file holds into an existing empty directory, its weights in bfloat16.

    Args:
        file: a Llama model with tied embeddings and a byte-level BPE tokenizer, as SmolLM2 is.
        directory: gets config.json, generation_config.json, model.safetensors and the tokenizer's files.
        advance: called with the number of weights of each tensor that is decoded.

    Raises:
        AHNError: the file is no such model, or the package that reads it is not installed.
    """
    from safetensors.torch import save_file

    reader = read(file)
    fields = Fields(reader)
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise AHNError(f"{file} is not a Llama model with a byte-level BPE tokenizer.")
    config = model_config(fields)
    weights = {}
    for tensor in reader.tensors:
        weights[transformers_name(tensor.name)] = _decode(tensor, config)
        advance(int(tensor.n_elements))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # as every other file
    config.save_pretrained(directory)
    generation_config(fields).save_pretrained(directory)
    tokenizer(fields).save_pretrained(directory)


def read(file: Path) -> GGUFReader:
    """The file's header and tensors, not yet decoded.

    Raises:
        AHNError: it is no GGUF file, or the package that reads it is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise AHNError("Reading a GGUF file needs the package gguf.") from None
    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        raise AHNError(f"{file} is not a whole GGUF file: {error}") from error


class Fields:
    """The metadata of a GGUF file by name, as plain Python values."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise AHNError(f"The GGUF file says nothing about {name}, so it is not the model that is expected.")
        return self._fields[name].contents()


def transformers_name(name: str) -> str:
    """What transformers calls a tensor that GGUF calls `name`."""
    layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"model.layers.{layer}.{NAMES[part]}.weight" if layer else f"{NAMES[part]}.weight"


def _decode(tensor: ReaderTensor, config: Any) -> torch.Tensor:
    from gguf.quants import dequantize

    weights = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(DTYPE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for part, number in heads.items():
        if f".{part}." in tensor.name:
            return _halves(weights, number)
    return weights


def _halves(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads · D, H) whose rotated pairs are neighbours, ordered as transformers rotates them: half by half."""
    pairs = weights.view(heads, -1, 2, weights.shape[-1])
    return pairs.transpose(1, 2).reshape(weights.shape)


def model_config(fields: Fields) -> Any:
    """The `LlamaConfig` that the metadata describe."""
    from transformers import LlamaConfig

    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=width // heads,
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 there
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        dtype=DTYPE,
        **_special_ids(fields),
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def generation_config(fields: Fields) -> Any:
    """Where the model ends: with the token that ends a message."""
    from transformers import GenerationConfig

    return GenerationConfig(**_special_ids(fields))


def _special_ids(fields: Fields) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": int(fields[f"tokenizer.ggml.{theirs}_token_id"]) for ours, theirs in names.items()}


def tokenizer(fields: Fields) -> PreTrainedTokenizerBase:
    """The byte-level BPE tokenizer, which takes digits one by one, with the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ids = {**_special_ids(fields), "unk_token_id": fields["tokenizer.ggml.unknown_token_id"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[t for t in special if tokens.index(t) not in ids.values()],
        **{name.removesuffix("_id"): tokens[i] for name, i in ids.items()},
    )
