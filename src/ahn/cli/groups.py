"""The options of a verb in its help: in groups, by what they are about."""

import itertools
from typing import Any

from typer.core import TyperCommand

GROUPS = {
    "Model": (
        *("--model", "--base-model", "--adapter", "--ahn-path", "--random-weights", "--device", "--dtype"),
        *("--replicas",),
    ),
    "Memory": ("--memory", "--method", "--methods", "--window", "--sinks", "--quantized", "--bits"),
    "Text": (
        *("--prompt", "--file", "--system", "--no-chat-template", "--text", "--book", "--length", "--documents"),
        *("--answer",),
    ),
    "Writing": ("--max-new-tokens", "--temperature", "--top-p", "--seed", "--prompt-lookup"),
    "Tasks": (
        *("--profile", "--data-dir", "--protocol-dir", "--max-length", "--limit", "--haystack", "--depth", "--samples"),
        *("run --length", "run --seed"),
    ),
    "Measurement": (
        *("--context", "--batch", "--new-tokens", "--real-prefill", "--max-seconds", "--activation-checkpointing"),
        *("--loss", "bench --profile"),
    ),
    "Address": ("--host", "--port", "--api-key"),
    "Conversations": ("--conversations", "--state-dir", "--state-mib", "--device-mib", "--disk-mib", "--max-age"),
    "Limits": ("--queue", "--max-prompt", "--max-body-mib", "--timeout", "serve --max-new-tokens"),
    "Output": ("--out", "--plot", "--output-path", "--json", "--help"),
}
"""Options by group, in the order of help. With a verb before it an option is of that group in this verb alone."""
ARGUMENTS = "Arguments"


class GroupedCommand(TyperCommand):
    """A verb whose help has a heading over each group of options, in boxes and without."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments first, then options in the order of their groups."""
        parameters: list[Any] = [*super().get_params(ctx)]
        groups = {parameter: self._group(parameter) for parameter in parameters}
        for parameter, group in groups.items():
            parameter.rich_help_panel = group
        order = [ARGUMENTS, *GROUPS]
        return sorted(groups, key=lambda parameter: order.index(groups[parameter]))

    def _group(self, parameter: Any) -> str:
        if parameter.param_type_name == "argument":
            return ARGUMENTS
        groups = {name: group for group, names in GROUPS.items() for name in names}
        option = next(name for name in parameter.opts if name.startswith("--"))
        return groups.get(f"{self.name} {option}") or groups[option]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Where there are no boxes."""
        for group, parameters in itertools.groupby(self.get_params(ctx), self._group):
            with formatter.section(group):
                formatter.write_dl([record for one in parameters if (record := one.get_help_record(ctx))])
