"""Private parts of other libraries are named in one module, and are there in the versions installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from support.sources import PACKAGE, trees

from ahn import private
from ahn.errors import AHNError

OWN = {"_ahn", "_exit", "_fields"}  # our own attribute of a model; what os and named tuples document under these names
TRAINER = PACKAGE / "training" / "trainer.py"


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each underscored attribute or module that is not the object's own."""
    nodes = list(ast.walk(tree))
    own = {node.attr for node in nodes if _of_self(node)}
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not _of_self(node):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("ahn"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        for name in names:
            if name.startswith("_") and not name.startswith("__") and name not in own | OWN:
                yield node.lineno, name


def _of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._dynamo import config",
        "from transformers.x import _name",
        "module._call_impl",
        "torch.ops.aten._scaled_dot_product_flash_attention(q)",
        "super()._get_grad_norm(model)",
    ],
)
def test_a_private_name_is_found(line: str) -> None:
    assert list(private_names(ast.parse(line)))


def test_nobody_else_names_private_parts() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees().items()
        if path != PACKAGE / "private.py"
        for line, name in private_names(tree)
        if not (path == TRAINER and name in private.TRAINER)
    ]
    assert found == []


def test_the_cache_is_an_argument_by_its_name_in_this_version() -> None:
    """`past_key_values` or `cache`: who writes one of them works with half of the versions."""
    files = [path for path in trees() if path != PACKAGE / "private.py"]
    assert [path for path in files if "past_key_values" in path.read_text(encoding="utf-8")] == []


def test_the_trainer_has_what_ours_overrides() -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer

    from ahn.training.trainer import DistillationTrainer

    shared = {name for name in vars(DistillationTrainer) if name.startswith("_") and name[1] != "_"} & set(dir(Trainer))
    assert shared <= set(private.TRAINER) <= set(dir(Trainer))
    with pytest.raises(AHNError, match=r"no Trainer\._prepare_inputs"):
        private.overrides_trainer(type("Other", (), {}))
