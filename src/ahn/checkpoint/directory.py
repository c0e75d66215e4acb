"""A checkpoint directory: its configuration and where each of its tensors lies. Nothing is loaded."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, Self

from ahn.checkpoint.stream import Entry, read_header
from ahn.config import MODEL_TYPE
from ahn.errors import AHNError
from ahn.files import read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

AHN_NAME = re.compile(r"(?:^|.*\.)(layers\.\d+\.(?:ahn|ahn_router)\..+)")
"""Of AHN tensors: `model.layers.{i}.ahn.fn.{parameter}` and `model.layers.{i}.ahn_router.{alpha,beta}`."""

Kind = Literal["base", "adapter", "merged"]
DESCRIPTION: dict[Kind, str] = {
    "base": "a plain model without AHN tensors",
    "adapter": "an AHN adapter without its base model",
    "merged": "a merged checkpoint of base model and AHN",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A local Hugging Face directory with safetensors weights.

    Args:
        tensors: every tensor by its name, in the order of the files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Entry]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the configuration and all headers of a directory."""
        if not path.is_dir():
            raise AHNError(f"{path} is not a directory.")
        return cls(path, read_json(path / CONFIG), _tensors(path))

    @property
    def ahn_tensors(self) -> dict[str, Entry]:
        """The tensors of the memories and routers."""
        return {name: entry for name, entry in self.tensors.items() if is_ahn(name)}

    @property
    def kind(self) -> Kind:
        """What the directory holds, judged by its tensors; without any of an AHN, by what it says of itself."""
        ahn = len(self.ahn_tensors)
        if ahn == 0:  # some memories have no parameters
            return "merged" if self.config.get("model_type") == MODEL_TYPE else "base"
        return "adapter" if ahn == len(self.tensors) else "merged"

    def require(self, kind: Kind) -> Self:
        """This checkpoint, if it is of the wanted kind."""
        if self.kind != kind:
            raise AHNError(f"{self.path} holds {DESCRIPTION[self.kind]}; expected {DESCRIPTION[kind]}.")
        return self


def _tensors(path: Path) -> dict[str, Entry]:
    # The single file wins over an index, as in transformers.
    if (path / WEIGHTS).exists():
        return read_header(path / WEIGHTS)
    if (path / INDEX).exists():
        return _indexed_tensors(path)
    if any(next(path.glob(pattern), None) for pattern in PICKLES):
        raise AHNError(
            f"{path} holds pickled weights, which are not read for safety: "
            "save the model again with save_pretrained, which writes safetensors."
        )
    raise AHNError(f"{path} has neither {WEIGHTS} nor {INDEX}.")


def _indexed_tensors(path: Path) -> dict[str, Entry]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AHNError(f"{path / INDEX} has no weight_map.")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise AHNError(f"{path / INDEX}: weight_map must name a file for each tensor.")
    found: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise AHNError(f"{path / INDEX} names {file!r}, which is not a file of the same directory.")
        for name, entry in read_header(path / file).items():
            if weight_map.get(name) == file:
                found[name] = entry
    absent = sorted(set(weight_map) - set(found))
    if absent:
        raise AHNError(f"{path / weight_map[absent[0]]} lacks {absent[0]}, which {INDEX} says it holds.")
    return found


def is_ahn(name: str) -> bool:
    """Whether a tensor of this name belongs to a memory or its router."""
    return AHN_NAME.fullmatch(name) is not None


def short_name(name: str) -> str:
    """`layers.{i}.ahn…` without what comes before: multimodal models nest their decoder deeper than text models."""
    match = AHN_NAME.fullmatch(name)
    return match[1] if match else name
