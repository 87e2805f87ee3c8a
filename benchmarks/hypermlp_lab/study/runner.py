"""Runs spread over processes; each result is written as it comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypermlp_lab.bench.environment import describe
from hypermlp_lab.study import ledger
from hypermlp_lab.study.plan import Records, pending
from hypermlp_lab.study.presets import Preset
from hypermlp_lab.study.runs import Job, Run, perform
from hypermlp_lab.training.files import FolderLock
from hypermlp_lab.training.interrupt import StopRequest

# seconds between looks at whether a signal came
_PATIENCE = 0.5


@dataclass(frozen=True)
class Runner:
    """Makes all runs of a preset that ``file`` does not have yet.

    Args:
        preset: the study.
        jobs: which of its jobs.
        file: of records; locked meanwhile.
        processes: runs at a time.
        threads: of each.
        log: told of every result, a line each.
    """

    preset: Preset
    jobs: tuple[Job, ...]
    file: Path
    processes: int
    threads: int
    log: Callable[[str], None]

    def run(self) -> bool:
        """Make the runs. False if a signal asked to stop: the runs at hand are then ended first.

        Raises:
            BlockingIOError: another process writes there.
            ChildProcessError: a process of a run was killed; what was done before is in the file.
        """
        # a folder of its own: the two files of a study may be written by two commands at once
        with FolderLock(self.file.parent / f".{self.file.stem}"), StopRequest() as stop:
            ledger.mend(self.file)
            records = ledger.read(self.file)
            environment = _environment(self.jobs, self.threads)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.processes, context, _prepare, (self.threads,)) as pool:
                try:
                    return self._loop(pool, records, environment, stop)
                except BaseException:
                    # a second signal, a full disk: no result would be kept, so nobody waits for the runs at hand
                    for child in multiprocessing.active_children():
                        child.kill()
                    raise

    def _loop(
        self, pool: ProcessPoolExecutor, records: dict[Run, Any], environment: dict[str, Any], stop: StopRequest
    ) -> bool:
        running: dict[Future[dict[str, Any]], Run] = {}
        began, before = time.monotonic(), len(records)
        while True:
            queue, waiting = pending(self.preset, self.jobs, records)
            for run in [run for run in queue if run not in running.values()][: self.processes - len(running)]:
                if not stop.requested:
                    running[pool.submit(perform, run)] = run
            if not running:
                return not queue
            done: set[Future[dict[str, Any]]] = set()
            while not done:
                done, _ = wait(running, _PATIENCE, FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                try:
                    record = future.result()
                except BrokenProcessPool as error:
                    raise ChildProcessError(f"the process of a run was killed ({run}): start again") from error
                records[run] = record | {"environment": environment}
                ledger.append(self.file, records[run])
                left = Counter(other.job for other in queue if other not in records) + waiting
                rate = (time.monotonic() - began) / (len(records) - before)
                self.log(_line(run, record, records, left, rate))


def _prepare(threads: int) -> None:
    """Called first in each process: the parent alone hears signals, and no process outlives it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _environment(jobs: Iterable[Job], threads: int) -> dict[str, Any]:
    device = next((job.device for job in jobs), "cpu")
    found = describe(device)
    found.pop("accelerator_details")
    return found | {"threads": threads}


def _line(run: Run, record: dict[str, Any], records: Records, left: Counter[Job], seconds_each: float) -> str:
    """A result, how far the study is, and about how long it still takes at the present speed."""
    cost = mean_cost(records)
    usual = sum(cost.values()) / len(cost)
    spent = sum(item["total_cpu_seconds"] for item in records.values()) / len(records)
    remaining = sum(cost.get(job, usual) * count for job, count in left.items()) / max(spent, 1e-9) * seconds_each
    ended = f"diverged at step {record['diverged_at']}, " if record["diverged_at"] else ""
    share = f"{len(records)}/{len(records) + left.total()}"
    result = f"{ended}{record['score']:.4f}, {record['total_cpu_seconds']:.0f} s"
    return f"{share:>9}, {duration(remaining)} left  {run}: {result}"


def mean_cost(records: Records) -> dict[Job, float]:
    """CPU seconds of a run, by job."""
    costs: defaultdict[Job, list[float]] = defaultdict(list)
    for run, record in records.items():
        costs[run.job].append(record["total_cpu_seconds"])
    return {job: sum(each) / len(each) for job, each in costs.items()}


def duration(seconds: float) -> str:
    """Such as ``2 h 05 min``."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
