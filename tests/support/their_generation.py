"""transformers' own tests of generation, on a class whose models have an AHN: `python -m support.their_generation`.

Their tests are in no distribution of theirs, so they are taken from a checkout of their repository.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import random
import sys
import unittest
from typing import Any

import torch
from models import awaken
from transformers import GenerationMixin

import ahn


def with_memory(kind: Any, window: int, sinks: int) -> Any:
    """A class of models like `kind`, each with an AHN from the beginning."""

    class Attached(kind, GenerationMixin):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            config = copy.deepcopy(config)
            if config._attn_implementation == "ahn":  # of another attached model
                config._attn_implementation = "sdpa"
            super().__init__(config, *args, **kwargs)
            awaken(ahn.attach(self, ahn.AHNConfig(window=window, sinks=sinks)))

    Attached.__name__ = kind.__name__
    return Attached


def tests_of(family: str, change: Any) -> unittest.TestSuite:
    """Their tests of generation for one family, with `change` applied to the class of causal language models."""
    module = importlib.import_module(f"tests.models.{family}.test_modeling_{family}")
    generation = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
    found = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, generation)]
    theirs: Any = next(x for x in found if x.__module__ == module.__name__)

    class Theirs(theirs):
        def setUp(self) -> None:
            super().setUp()
            causal = [x for x in self.all_model_classes if x.__name__.endswith("ForCausalLM")]
            self.all_model_classes = tuple(map(change, causal))
            torch.manual_seed(0)
            random.seed(0)

        def prepare_config_and_inputs_for_generate(self, *args: Any, **kwargs: Any) -> Any:
            """Their masks end with padding, which is refused beyond the window: none here."""
            config, inputs = super().prepare_config_and_inputs_for_generate(*args, **kwargs)
            if "attention_mask" in inputs:
                inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            return config, inputs

        @property
        def all_generative_model_classes(self) -> Any:
            return self.all_model_classes

    names = [name for name in dir(generation) if name.startswith("test_")]
    return unittest.TestSuite(Theirs(name) for name in names if callable(getattr(Theirs, name, None)))


def main() -> None:
    """Print a JSON object: the name of each test, and "passed", "skipped" or the last line of what was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("family")
    parser.add_argument("--window", type=int)
    parser.add_argument("--sinks", type=int, default=1)
    given = parser.parse_args()
    sys.path.insert(0, given.source)
    change = (lambda kind: with_memory(kind, given.window, given.sinks)) if given.window else lambda kind: kind
    suite = tests_of(given.family, change)
    names = [test.id().rpartition(".")[2] for test in suite]  # type: ignore[union-attr]
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=2).run(suite)
    outcomes = dict.fromkeys(names, "passed")
    outcomes |= {test.id().rpartition(".")[2]: "skipped" for test, _ in result.skipped}
    for test, trace in [*result.failures, *result.errors]:
        name = (test.test_case if hasattr(test, "test_case") else test).id().rpartition(".")[2]
        lines = [line for line in trace.strip().splitlines() if line and not line.startswith(" ")]
        outcomes[name] = lines[-1][:300]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
