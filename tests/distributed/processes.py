"""Several checks in one start of a few processes: starting them takes longer than the checks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

WORLD = 2
TIMEOUT = timedelta(seconds=60)
# once, by the server that processes are forked from: fresh ones, as spawned ones are, without seconds of imports each
PRELOADED = [
    "pytest",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "hypermlp.distributed",
    "hypermlp.models",
]


def run_checks(checks: Mapping[str, Callable[[], None]], folder: Path, world: int = WORLD) -> dict[str, list[str]]:
    """Every check in each of ``world`` processes; what went wrong in each, by name: empty where nothing did.

    A check should compare when all processes are through with its collective calls.
    """
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = int(opened.getsockname()[1])
    multiprocessing.set_forkserver_preload(PRELOADED)
    # before Python 3.14 the server does not know this process's path, and would load another checkout that is installed
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    # as bytes: what is handed to a process as it starts has a descriptor for every tensor, of which it takes 250
    arguments = world, port, environment, pickle.dumps(checks), str(folder)
    torch.multiprocessing.start_processes(_process, arguments, nprocs=world, start_method="forkserver")
    found = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return {name: [report[name] for report in found if report[name]] for name in checks}


def _process(
    rank: int,
    world: int,
    port: int,
    environment: dict[str, str],
    checks: bytes,
    folder: str,
) -> None:
    os.environ.clear()  # that of the server's start
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=TIMEOUT)
    report = {name: _trouble(check) for name, check in pickle.loads(checks).items()}
    torch.save(report, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # the report says it all; PyTorch's and accelerate's threads sometimes abort a process that takes itself apart
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _trouble(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception:
        return f"process {dist.get_rank()}: {traceback.format_exc()}"
    return ""
