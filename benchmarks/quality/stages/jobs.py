"""Jobs shared among processes: whichever is free takes the next, and one that fails does not stop the others."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO, TypeAlias

from .log import Clock

Start: TypeAlias = Callable[[str], Callable[[Any], None]]
"""Called in a new process with its device: gives the function that does one job after another. It must be picklable."""

PATIENCE = 10.0
"""Seconds that an idle process has to end."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to do.

    Args:
        name: of the job, before every line that it prints.
        work: what the process is told.
        needs: names of jobs that must be done before.
        turn: jobs of one turn are done one after the other, as a GPU's memory may want it.
    """

    name: str
    work: Any
    needs: tuple[str, ...] = ()
    turn: str | None = None


def do(jobs: Sequence[Job], start: Start, devices: Sequence[str], until: float | None = None) -> list[str]:
    """Do all jobs, in their order as far as what they need allows, in a process for each of `devices`.

    A process that a job ends, by an error or a crash, is replaced by a new one. The processes end with this call,
    whichever way it ends; SIGTERM ends it as Ctrl-C does.

    Args:
        until: seconds from now after which no job is begun.

    Returns:
        Names of the jobs that failed, and of those that needed one of them.
    """
    clock, began = Clock(), time.perf_counter()
    waiting, failed, done = list(jobs), [], 0
    workers = [Worker(start, device) for device in devices]
    before = signal.signal(signal.SIGTERM, _ended)

    def ready() -> Job | None:
        begun = [worker.job for worker in workers if worker.job]
        open_names = {job.name for job in (*waiting, *begun)}
        turns = {job.turn for job in begun if job.turn}
        for job in [job for job in waiting if not {*failed}.isdisjoint(job.needs)]:
            waiting.remove(job)
            failed.append(job.name)
            clock.say(f"{job.name} is left out: {', '.join(name for name in job.needs if name in failed)} failed")
            return ready()
        return next((job for job in waiting if job.turn not in turns and open_names.isdisjoint(job.needs)), None)

    try:
        while True:
            if until is not None and waiting and time.perf_counter() - began > until:
                clock.say(f"time is over; not begun: {', '.join(job.name for job in waiting)}")
                waiting.clear()
            for worker in workers:
                job = None if worker.job else ready()
                if job is not None:
                    waiting.remove(job)
                    worker.give(job)
            busy = {worker.connection: worker for worker in workers if worker.job}
            if not busy:
                return failed
            for connection in wait(list(busy)):
                job, seconds, succeeded = busy[connection].take()
                done += 1
                if not succeeded:
                    failed.append(job.name)
                clock.say(f"{'done' if succeeded else 'FAILED'} {done} of {len(jobs)}: {job.name}, {seconds:.0f} s")
    finally:
        for worker in workers:
            worker.stop()
        signal.signal(signal.SIGTERM, before)


def _ended(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


class Worker:
    """A process that does jobs, one at a time, and is started when there is one."""

    def __init__(self, start: Start, device: str) -> None:
        self.job: Job | None = None
        self.connection: Any = None
        self._start, self._device = start, device
        self._process: Any = None

    def give(self, job: Job) -> None:
        """Begin a job."""
        if self._process is None:
            # Spawned: CUDA does not survive a fork.
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._start, self._device, theirs))
            self._process.start()
            theirs.close()  # so that the end of the process is the end of what can be read
        self.connection.send(job)
        self.job, self._began = job, time.perf_counter()

    def take(self) -> tuple[Job, float, bool]:
        """The job that has ended, how long it took, and whether it was done; waits for its end."""
        job, self.job = self.job, None
        assert job is not None
        try:
            self.connection.recv()
            done = True
        except EOFError:
            done = False
            self.stop()
        return job, time.perf_counter() - self._began, done

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self.connection.close()
            if self.job is None:  # it ends by itself when nothing more can come
                self._process.join(PATIENCE)
            self._process.terminate()
            self._process.join()
            self._process = None


class Prefixed:
    """A text stream of whole lines, each with a name before it: those of several processes stay apart."""

    def __init__(self, stream: TextIO) -> None:
        self.prefix = ""
        self._stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self.prefix}: {line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _serve(start: Start, device: str, jobs: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    streams = Prefixed(sys.stdout), Prefixed(sys.stderr)
    sys.stdout, sys.stderr = streams
    work = None
    while True:
        try:
            job = jobs.recv()
        except EOFError:  # the first process is gone
            return
        for stream in streams:
            stream.prefix = job.name
        try:
            work = work or start(device)
            work(job.work)
        except Exception:
            traceback.print_exc()
            return  # after some errors a GPU is of no more use to this process
        jobs.send(None)
