"""`import ahn` makes transformers' Auto classes know checkpoints with an AHN, without importing transformers.

`ahn --help` must not wait for transformers, and whoever never uses it need not. So the classes in `ahn.auto.classes`
are registered when transformers' own Auto modules are imported, by whoever wants them: at once if they are there
already, else by a finder that lets Python find and run such a module as always, and registers afterwards. From then on
classes of base models refuse such checkpoints.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ahn.config import ARCHITECTURE, MODEL_TYPE, PUBLISHED_NAME, SAVED_BLOCK
from ahn.errors import AHNError

PACKAGE = "transformers.models.auto."
BLOCK = {"memory", "window", "sinks", "full_attention_layers", "router", "q_proj"}
"""What the saved block of every version says of an AHN, and no other configuration."""


def register_with_transformers() -> None:
    """Register now what can be, the rest when its module is imported. Harmless when repeated."""
    waiting = {
        "transformers.modeling_utils": _register_refusal,
        f"{PACKAGE}configuration_auto": _register_config,
        f"{PACKAGE}modeling_auto": _register_model,
        "transformers.processing_utils": _name_model,  # which puts another module in the place of `transformers`
    }
    for name, register in list(waiting.items()):
        if name in sys.modules:
            register()
            del waiting[name]
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """Finds nothing itself; of the modules that it waits for, it lets the others' loader do one thing more."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self._waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        register = self._waiting.pop(name, None)
        if register is None:
            return None
        spec = importlib.util.find_spec(name)  # comes here again, and finds nothing waiting
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_run, spec.loader.exec_module, register)  # type: ignore[method-assign]
        return spec


def _run(exec_module: Callable[[ModuleType], None], register: Callable[[], None], module: ModuleType) -> None:
    exec_module(module)
    register()


def _register_refusal() -> None:
    from torch.nn.modules.module import register_module_module_registration_hook

    register_module_module_registration_hook(_refuse_memories)


def _refuse_memories(module: Any, name: str, part: Any) -> None:
    """Before a part of a module is set: raise AHNError if a base model's class is made of a checkpoint with an AHN.

    So it was with `Qwen2ForCausalLM.from_pretrained(merged)`: the memory's weights were at most listed as unexpected.
    """
    fields = getattr(vars(module).get("config"), "__dict__", {})
    # Blocks once had the base's type, and transformers takes what has it for the configuration that it looks for.
    block = fields.keys() >= BLOCK
    if block or fields.get(PUBLISHED_NAME) is not None or "memory" in (fields.get(SAVED_BLOCK) or ()):
        raise AHNError(
            f"This checkpoint has an AHN, which {type(module).__name__} would leave out. Load it with "
            "ahn.from_pretrained."
        )


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ahn.auto.classes import AHNModelConfig

    CONFIG_MAPPING.register(MODEL_TYPE, AHNModelConfig, exist_ok=True)
    _name_model()


def _register_model() -> None:
    from transformers.models.auto import modeling_auto

    from ahn.auto.classes import LOADERS, AHNModelConfig

    for loader in LOADERS:
        getattr(modeling_auto, loader.auto_class).register(AHNModelConfig, loader, exist_ok=True)


def _name_model() -> None:
    """Where trainers and `transformers serve` look up what a config.json calls it."""
    import transformers

    if f"{PACKAGE}configuration_auto" in sys.modules:
        from ahn.auto.classes import AHNForCausalLM

        setattr(transformers, ARCHITECTURE, AHNForCausalLM)
