"""Trains and measures the rows of a study in several processes, each row in one of its own."""

from __future__ import annotations

import dataclasses
import subprocess
import threading
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
        name: printed before its lines.
        command: what computes it, without the device.
        after: the job that has to be done first, if that is among them.
    """

    name: str
    command: Sequence[str]
    after: str | None = None


def run(jobs: Sequence[Job], devices: Sequence[str]) -> list[str]:
    """Run all jobs, as many at once as devices are named, one a device; in order, but for those that have to wait.

    Lines that they print appear with the job's name. Returns the names of those that failed, or whose predecessor did.
    """
    names = {job.name for job in jobs}
    waiting = list(jobs)
    done: set[str] = set()
    failed: list[str] = []
    running: list[subprocess.Popen[str]] = []
    changed = threading.Condition()

    def take() -> Job | None:
        """The next job that nothing holds up; None when there is none and will be none."""
        with changed:
            while waiting:
                for job in waiting:
                    if job.after in failed:
                        failed.append(job.name)
                        waiting.remove(job)
                        break
                    if job.after not in names or job.after in done:
                        waiting.remove(job)
                        return job
                else:
                    changed.wait()
        return None

    def work(device: str) -> None:
        while (job := take()) is not None:
            with subprocess.Popen(
                [*job.command, "--device", device], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                running.append(process)
                assert process.stdout is not None
                for line in process.stdout:
                    print(f"{job.name} | {line}", end="", flush=True)
            with changed:
                done.add(job.name)
                if process.returncode != 0:
                    failed.append(job.name)
                changed.notify_all()

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # of Ctrl-C
        with changed:
            waiting.clear()
            changed.notify_all()
        for process in running:
            process.terminate()
    return failed
