"""What several GPUs of one machine give: training by DDP and FSDP2, and one model read and continued over all of them.

    python benchmarks/several_gpus                          # all parts, on all GPUs that are visible
    python benchmarks/several_gpus --only ddp,one,heads     # some of them; the loss of `heads` in tokens needs `one`

It starts a process per GPU itself; under torchrun it is one of those. Random weights in real shapes, random tokens.
Lines of JSON say what was measured, tables come last. No repetition begins after `--limit` seconds of a part, but
a first step may compile for longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from place import Place
from reading import Heard, one_gpu, over_heads, over_layers
from reading import Work as Reading
from training import Work as Training
from training import never_whole, replicas, shares
from transformers import AutoConfig, PreTrainedModel

import ahn
from ahn.bench.model import build
from ahn.bench.shapes import SHAPES, configuration
from ahn.measure.clock import release

SHARP = 3.0
"""Queries of random weights are made this much longer: attention that singles tokens out is what a window cuts off."""
LONG, SHORT = {"length": 24576, "window": 8064, "sinks": 128}, {"length": 8192, "window": 480, "sinks": 32}


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement: a function of its work and place, and the shape that it is made with."""

    run: Callable[..., Any]
    model: str
    length: int
    window: int
    sinks: int
    samples: int = 1
    steps: int = 5


PARTS = {
    "small-ddp": Part(replicas, "smollm2-135m", **SHORT, samples=4, steps=10),
    "small-fsdp2": Part(shares, "smollm2-135m", **SHORT, samples=4, steps=10),
    "ddp": Part(replicas, "qwen2.5-3b", **LONG),
    "fsdp2": Part(shares, "qwen2.5-3b", **LONG),
    "fsdp2-14b": Part(never_whole, "qwen2.5-14b", **LONG, steps=4),
    "one": Part(one_gpu, "qwen2.5-14b", **LONG | {"length": 32768}),
    "layers": Part(over_layers, "qwen2.5-14b", **LONG | {"length": 32768}),
    "heads": Part(over_heads, "qwen2.5-14b", **LONG | {"length": 32768}),
}
READING = ("one", "layers", "heads")


def main() -> None:
    options = parse()
    if "RANK" not in os.environ:
        gpus = 2 if options.cpu else torch.cuda.device_count()
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        os.execv(sys.executable, [sys.executable, *command, *sys.argv])
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast over NVLink is not given to every container
    place = join(options.cpu)
    gpu = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu"
    place.say(device=gpu, gpus=place.ranks, torch=torch.__version__, transformers=transformers.__version__)
    found: dict[str, Any] = {}
    first: Heard | None = None
    for name in options.only:
        place.barrier()
        part, start = PARTS[name], time.monotonic()
        here = dataclasses.replace(place, until=start + options.limit)
        facts, heard = measure(name, part, options, here, first)
        first = first or heard
        release(place.device)
        found[name] = facts
        place.say(part=name, model=options.model or part.model, took_s=time.monotonic() - start, **facts)
    if place.speaks:
        print(tables(found, place.ranks), flush=True)
    place.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=parts, default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a part begins nothing new")
    parser.add_argument("--memory", default="gated_deltanet")
    parser.add_argument("--model", help="one config.json for all parts")
    parser.add_argument("--length", type=int, help="tokens of all samples and prompts; the window is a quarter")
    parser.add_argument("--cpu", action="store_true", help="two processes, gloo, float32")
    return parser.parse_args()


def parts(names: str) -> list[str]:
    """Of a list with commas, in the order of PARTS."""
    chosen = names.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in chosen]


def join(cpu: bool) -> Place:
    """Meet the other processes: a device's own library for gradients, and a group on the host for waiting."""
    gpu = torch.cuda.is_available() and not cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(minutes=4))
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))
    return Place(dist.get_rank(), dist.get_world_size(), device, waiting, dist.get_rank() == 0)


def measure(
    name: str, part: Part, options: argparse.Namespace, place: Place, first: Heard | None
) -> tuple[dict[str, Any], Heard | None]:
    """What one part found. One that fails says why, and the others go on."""
    length = options.length or part.length
    window = length // 4 if options.length else part.window
    config = ahn.AHNConfig(options.memory, window=window, sinks=min(part.sinks, window // 4))

    def base(device: torch.device) -> PreTrainedModel:
        return random_model(options.model or part.model, device)

    try:
        if name in READING:
            return part.run(Reading(base, config, length), place, first)
        return part.run(Training(base, config, length, part.samples, part.steps), place), None
    except Exception as error:
        if place.ranks > 1 and name not in ("one", "layers"):
            raise  # the others wait for this process
        return {"failed": f"{type(error).__name__}: {error}"}, None


def random_model(name: str, device: torch.device) -> PreTrainedModel:
    """The same numbers in every process; on "meta" none."""
    config = configuration(name) if name in SHAPES else AutoConfig.from_pretrained(name)
    model = build(config, device, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith("q_proj.weight"):
                weight.mul_(SHARP)
    return model


def tables(found: dict[str, Any], gpus: int) -> str:
    """What was found, in short."""
    training = f"| training | tokens/s, 1 GPU | {gpus} GPUs | ratio | losses | apart | peak GiB a GPU |"
    lines = [training, "|---" * 7 + "|"]
    for name, facts in found.items():
        if name not in READING and "failed" not in facts:
            lines.append(training_row(name, facts))
    lines += ["", "| reading | prefill s | ms/token | same tokens | logits apart | peak GiB |", "|---" * 6 + "|"]
    for name, facts in found.items():
        lines += [reading_row(f"{name}, {way}", facts[way]) for way in ("ordinary", "captured") if way in facts]
    lines += [f"{name} failed: {facts['failed']}" for name, facts in found.items() if "failed" in facts]
    return "\n".join(lines)


def training_row(name: str, facts: dict[str, Any]) -> str:
    together, one = facts.get("all", facts), facts.get("one")
    speed = f"{one['tokens_per_second']:.0f}" if one else "–"
    ratio, apart = (f"{facts[key]:.4g}" if key in facts else "–" for key in ("ratio", "largest_difference_of_losses"))
    losses = f"{together['losses'][0]:.4f} to {together['losses'][-1]:.4f}"
    peak = ", ".join(f"{x:.1f}" for x in together["peak_gib"])
    return f"| {name} | {speed} | {together['tokens_per_second']:.0f} | {ratio} | {losses} | {apart} | {peak} |"


def reading_row(name: str, facts: dict[str, Any]) -> str:
    same, apart = (f"{facts[key]:.3g}" if key in facts else "–" for key in ("same_tokens", "logits_apart"))
    peak = ", ".join(f"{x:.1f}" for x in facts["peak_gib"])
    return f"| {name} | {facts['prefill_s']:.2f} | {facts['ms_per_token']:.2f} | {same} | {apart} | {peak} |"


if __name__ == "__main__":
    main()
