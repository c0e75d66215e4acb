"""`push_to_hub` of a model with an AHN: the checkpoint, and a card that says what it is and how to use it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel

from ahn.errors import AHNError
from ahn.files import expanded, write_text
from ahn.memory.layer import added_parameters
from ahn.model.saving import BASE_NAME, save

CARD = "README.md"
TEXT = """---
library_name: ahn
tags: [{tags}]{about}
---

# {title}

`{base}` with an Artificial Hippocampus Network (arXiv 2510.07318): sinks and a sliding window are kept exactly, and
what leaves the window goes into a memory of fixed size. The base model's weights are unchanged. Kind {memory},
{parameters:.2f} M parameters, window {window:,} + {sinks:,} sinks{quantized}. {licence}

```python
import ahn
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")  # window= and sinks= choose others
tokenizer = AutoTokenizer.from_pretrained("{base}")
```

Without `import ahn` transformers says that it does not know the model type `ahn`.
{metrics}"""
METRICS = """
## Held-out data

Beyond the window, as the memory's training measured it.

| | |
|---|---|
{rows}
"""
_MEASURED = {
    "eval_kl": "KL to full attention (nats per token)",
    "eval_ce": "cross entropy",
    "eval_teacher_ce": "cross entropy of full attention",
    "eval_gap": "gap",
    "eval_recall": "recall of the tokens looked at most",
}


def save_pretrained(model: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.save_pretrained`; with `push_to_hub` it is uploaded as `push_to_hub` does it.

    Raises:
        AHNError: as `save`.
    """
    if not kwargs.pop("push_to_hub", len(args) > 2 and args[2]):
        return save(model, save_directory, *args, **kwargs)
    given = {name: kwargs.pop(name) for name in (*_UPLOAD, "repo_id") if name in kwargs}
    save(model, save_directory, *args[:2], **kwargs)
    folder = expanded(save_directory)
    return _upload(model, folder, given.pop("repo_id", folder.name), **given)


def push(model: PreTrainedModel, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> Any:
    """`model.push_to_hub`, as in transformers, with a card; one that the repository has is kept.

    Raises:
        AHNError: as `save_pretrained`, or an argument is unknown.
    """
    if unknown := kwargs.keys() - {*_UPLOAD}:
        raise AHNError(f"push_to_hub takes no {min(unknown)}; it takes {', '.join(_UPLOAD)}.")
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, max_shard_size=max_shard_size)
        return _upload(model, Path(folder), repo_id, **kwargs)


_UPLOAD = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def _upload(
    model: PreTrainedModel,
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: bool | str | None = None,
    tags: list[str] | None = None,
    commit_message: str = "Upload model with an AHN",
    **kwargs: Any,
) -> Any:
    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if not (folder / CARD).exists() and not api.file_exists(name, CARD):
        write_text(folder / CARD, card(model, name, tags or []))
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message, **kwargs)


def card(model: PreTrainedModel, title: str, tags: list[str]) -> str:
    """What `README.md` says of a model that is called `title`: licence, base, metrics as far as they are known."""
    config, base = model.ahn_config, str(getattr(model.config, BASE_NAME, None) or model.name_or_path or "")
    on_hub, licence = "/" in base and not expanded(base).exists(), licence_of(base)
    shown = base if on_hub else Path(base).name or type(model).__name__
    about = {"base_model": base if on_hub else None, "license": licence}
    tier = f", {config.quantized:,} tokens before it at {config.key_bits} and {config.value_bits} bits"
    return TEXT.format(
        tags=", ".join(["long-context", "artificial-hippocampus-network", *tags]),
        about="".join(f"\n{name}: {x}" for name, x in about.items() if x),
        title=title,
        base=shown,
        memory=config.memory,
        parameters=sum(p.numel() for p in added_parameters(model).values()) / 1e6,
        window=config.window,
        sinks=config.sinks,
        quantized=tier if config.quantized else "",
        licence=f"Licence of the base model: {licence}."
        if licence
        else "For the weights the base model's licence holds.",
        metrics=_metrics(model._ahn.measured),
    )


def licence_of(base: str) -> str | None:
    """What the card in a base model's folder gives as its licence; None where it has none, or lies elsewhere."""
    file = expanded(base) / CARD if base else Path(CARD)
    if not base or not file.is_file():
        return None
    try:
        found = ModelCard.load(file).data.to_dict().get("license")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _metrics(measured: dict[str, Any] | None) -> str:
    known = {name: x for name in _MEASURED if isinstance(x := (measured or {}).get(name), int | float)}
    if not known:
        return ""
    rows = "\n".join(f"| {_MEASURED[name]} | {x:.4f} |" for name, x in known.items())
    return METRICS.format(rows=rows)
