"""`ahn-lm-eval`: EleutherAI's lm-evaluation-harness with our models and LV-Eval; all else is its own command line.

    ahn-lm-eval run --model ahn --model_args pretrained=BASE,adapter=DIR,window=32640 --tasks longbench_qmsum

The harness has no entry points for plug-ins, so this program registers a model class, gives its task manager a
directory more, and starts it.
"""

import sys
import tempfile
from pathlib import Path

from ahn.errors import AHNError, install_command
from ahn.evaluation.tasks import lveval


def main() -> None:
    """Run the harness with the arguments of this process."""
    try:
        from lm_eval import tasks
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"ahn-lm-eval: lm-eval is missing ({error}): {install_command('lm-eval')}", file=sys.stderr)
        sys.exit(1)
    from ahn.evaluation.lm_eval import model  # noqa: F401  (registers itself)

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))

        class WithOurTasks(tasks.TaskManager):
            """Looks for tasks in our directory, too; the command line can name only one."""

            def __init__(self, verbosity=None, include_path=None, **options):  # type: ignore[no-untyped-def]
                given = include_path if isinstance(include_path, list) else [include_path] if include_path else []
                super().__init__(verbosity, [folder, *given], **options)

        tasks.TaskManager = WithOurTasks
        try:
            cli_evaluate()
        except AHNError as error:
            print("ahn-lm-eval:", " ".join(str(error).split()), file=sys.stderr)
            sys.exit(1)


def write_tasks(folder: Path) -> None:
    """Describe LV-Eval's tasks as the harness wants it: a YAML file each, such as `lveval_factrecall_en_16k`."""
    for task in lveval.TASKS:
        for level in lveval.LEVELS:
            name = f"lveval_{task}_{level}"
            lines = [f"task: {name}", "class: !function ahn.evaluation.lm_eval.lveval.LVEvalTask"]
            lines += [f"tag: [lveval, lveval_{level}]", ""]
            (folder / f"{name}.yaml").write_text("\n".join(lines), encoding="utf-8")
