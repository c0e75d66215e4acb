"""The recipes: `tiny` makes the model that ships with the package, `study` the base of the quality comparison.

`smoke` turns either into a shape that a CPU goes through in a minute.
"""

from __future__ import annotations

import dataclasses

from .recipe import Context, Corpus, Distillation, Phase, Recipe, Run, Tier

SLOW = (256.0, 16384.0)
"""Shortest and longest e-fold of forgetting, in tokens, that heads begin with."""
LONG = {"steps": 1000}

TINY = Recipe(
    name="tiny",
    corpus=Corpus("stdlib", vocabulary=4096, sample=1 << 30),
    hidden=256,
    layers=8,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp=672,
    phases=(
        Phase(steps=400, length=1024, batch=64, facts=(8, 32), reach=256),
        Phase(steps=200, length=1024, batch=64, facts=(8, 32), reach=None),
        Phase(steps=1250, length=4096, batch=16, facts=(8, 48), reach=None),
        Phase(steps=150, length=8192, batch=8, facts=(16, 64), reach=None),
    ),
    distillation=Distillation(steps=600, horizons=SLOW),
    runs=(
        Run("gated_deltanet"),
        Run("deltanet"),
        Run("mamba2"),
        Run("routed_deltanet"),
        # Two bits a number, without training: alone, and before a memory.
        Run("two_bits", {"memory": "window_only"}, tier=Tier(windows=3.5)),
        Run("two_bits+deltanet", {"memory": "deltanet"}, tier=Tier(windows=3.5), of="deltanet"),
        Run(
            "two_bits+routed_deltanet",
            {"memory": "routed_deltanet"},
            tier=Tier(windows=3.5),
            of="routed_deltanet",
        ),
    ),
    contexts=(Context(4096, (256,), chunks=24, texts=16), Context(8192, (256,), chunks=24, texts=16)),
    sinks=32,
)

_THREE = (0, 1, 2)
STUDY = Recipe(
    name="study",
    corpus=Corpus("installed", vocabulary=8192, sample=24_000_000),
    hidden=512,
    layers=8,
    heads=8,
    kv_heads=2,
    head_dim=64,
    mlp=1408,
    matrix_decay=0.1,
    phases=(
        Phase(steps=300, length=1024, batch=64, facts=(8, 32), reach=256),
        Phase(steps=200, length=1024, batch=64, facts=(8, 32), reach=None),
        Phase(steps=1000, length=4096, batch=16, facts=(8, 48), reach=None),
        Phase(steps=500, length=8192, batch=8, facts=(16, 64), reach=None),
    ),
    distillation=Distillation(
        steps=200, length=8192, batch=8, facts=(32, 128), totals=(128, 256, 512, 1024, 2048), log_every=25
    ),
    # The most important first: they begin in this order, other seeds than the first after all first ones. On one H100
    # all of it has to end well within half an hour.
    runs=(
        # The published memories, trained as published.
        Run("gated_deltanet", seeds=_THREE, far=True),
        Run("deltanet", seeds=_THREE, far=True),
        Run("mamba2", seeds=_THREE, far=True),
        # Several states a key head.
        Run("routed_deltanet", seeds=_THREE, far=True),
        Run("routed_deltanet-long", {"memory": "routed_deltanet"}, LONG, far=True),
        # Two bits a number, without training: beside the window, in place of half of it, and before a memory.
        Run("two_bits", {"memory": "window_only"}, far=True, tier=Tier(windows=3.5)),
        Run("two_bits-half", {"memory": "window_only"}, far=True, tier=Tier(exact=0.5, bytes_of="gated_deltanet")),
        Run(
            "two_bits-half+deltanet",
            {"memory": "deltanet"},
            far=True,
            tier=Tier(exact=0.5, bytes_of="deltanet"),
            of="deltanet",
        ),
        Run(
            "two_bits-half+routed_deltanet",
            {"memory": "routed_deltanet"},
            far=True,
            tier=Tier(exact=0.5, bytes_of="routed_deltanet"),
            of="routed_deltanet-long",
        ),
        # The paper's ablations.
        Run("gated_deltanet-ce", {"memory": "gated_deltanet"}, {"loss": "ce"}),
        Run("gated_deltanet-distill", {"memory": "gated_deltanet"}, {"loss": "distill"}),
        Run("gated_deltanet-kl+ce", {"memory": "gated_deltanet"}, {"loss": "kl+ce"}),
        Run("gated_deltanet-kl+distill", {"memory": "gated_deltanet"}, {"loss": "kl+distill"}),
        Run("gated_deltanet-fixed512", {"memory": "gated_deltanet"}, {"total": 512}),
        # How it begins, and the paper's router.
        Run("gated_deltanet-slow", {"memory": "gated_deltanet"}, {"horizons": SLOW}),
        Run("deltanet-router", {"memory": "deltanet", "router": True}),
    ),
    contexts=(
        Context(8192, (256, 512, 1024), chunks=32, texts=24, needle_lengths=(2048, 4096, 8192), trials=4),
        Context(16384, (512,), chunks=12, texts=6, needle_lengths=(16384,), trials=4, far=True),
        Context(32768, (512,), chunks=6, texts=3, needle_lengths=(32768,), trials=4, far=True),
        Context(65536, (512,), chunks=4, texts=2, needle_lengths=(65536,), trials=2, far=True),
    ),
    sinks=32,
)

RECIPES = {recipe.name: recipe for recipe in (TINY, STUDY)}


def smoke(recipe: Recipe) -> Recipe:
    """The same stages on a model of two small layers, little text and short sequences."""
    trained = [run for run in recipe.runs if run.tier is None]
    far = [Context(1024, (128,), chunks=2, texts=1, needle_lengths=(768,), trials=1, far=True)]
    return dataclasses.replace(
        recipe,
        corpus=dataclasses.replace(recipe.corpus, vocabulary=2048, sample=1_000_000, most=2_000_000),
        hidden=64,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=32,
        mlp=128,
        warmup=5,
        log_every=5,
        evaluate_every=20,
        phases=(
            Phase(steps=20, length=256, batch=8, facts=(2, 6), reach=128),
            Phase(steps=10, length=512, batch=4, facts=(2, 12), reach=None),
        ),
        distillation=Distillation(steps=3, length=512, batch=2, facts=(4, 12), totals=(64, 128), log_every=2),
        runs=tuple(
            dataclasses.replace(run, changes=_shorter(run), seeds=run.seeds[:2])
            for run in recipe.runs
            if run in trained[:6] or run.tier is not None
        ),
        contexts=(
            Context(512, (64, 128), chunks=4, texts=2, needle_lengths=(256,), trials=1),
            *(far if any(context.far for context in recipe.contexts) else []),
        ),
        sinks=16,
    )


def _shorter(run: Run) -> dict[str, object]:
    smaller = {"total": 128, "steps": 5}
    return {name: smaller.get(name, value) for name, value in run.changes.items()}
