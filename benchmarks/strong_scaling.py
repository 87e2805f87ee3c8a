"""Strong scaling of context parallelism on a CPU: one sequence on two processes, as a ratio to one process.

    python benchmarks/strong_scaling.py                              # T = 8192; writes results/scaling-cpu.json
    python benchmarks/strong_scaling.py --length 256 --rounds 3 --out tiny.json

One HyperGLU layer, forward and backward of one sequence. The same processes, of one thread each, do both: in a round
the first of them computes the whole sequence while the other waits, and then each computes its rows by
``shard_sequence``; which comes first alternates. Before anything is timed, the output and every gradient of the
processes are judged as those of all benchmarks are (``hypermlp_lab/bench/gate.py``): against one process in float64, by
what one loses in float32. A time of two processes is that of the slower one. Needs as many cores as processes, with
nothing else on them.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypermlp import HyperGLU
from hypermlp.distributed import sequence_part, sequence_whole, shard_sequence
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.bench.gate import Errors, compare, judge, with_gradients
from hypermlp_lab.bench.measure import quartiles
from hypermlp_lab.training.files import check_place, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "scaling-cpu.json"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def layer_of(sizes: dict[str, int]) -> HyperGLU:
    """Away from its start, where some tables are zero and could be ignored unnoticed."""
    torch.manual_seed(0)
    layer = HyperGLU(sizes["hidden_size"], num_heads=sizes["num_heads"], max_lag=sizes["max_lag"])
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return layer


def seconds(call: Callable[[], object]) -> float:
    """Of the slowest process, from a common start."""
    dist.barrier()
    start = time.perf_counter()
    call()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), quartiles(values), strict=True))


def step(layer: HyperGLU, x: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).sum().backward()


def errors(one: HyperGLU, part: HyperGLU, x: Tensor) -> Errors:
    """Of ``part`` over the processes, in the output and in every gradient, against ``one`` in float64."""
    pull = normal(*x.shape, seed=2)

    def evaluate(exact_in: torch.dtype | None) -> dict[str, Tensor]:
        if exact_in is not None:
            module = deepcopy(one).to(exact_in)
            return with_gradients(module, module, x.to(exact_in), pull)
        found = with_gradients(lambda states: sequence_whole(part(sequence_part(states))), part, x, pull)
        for name, gradient in found.items():
            if name != "output":  # each process has its part of gradients
                dist.all_reduce(gradient)
        return found

    return compare(evaluate, x.dtype)


def measure(rank: int, port: int, sizes: dict[str, int], rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    world = sizes["processes"]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    one, part = layer_of(sizes), layer_of(sizes)
    shard_sequence(part)
    x = normal(1, sizes["length"], sizes["hidden_size"], seed=1)
    verdict = judge(f"{world} processes", partial(errors, one, part, x))
    if not verdict.passed:
        raise ValueError(f"{verdict.provider} differ from one, nothing is timed: {verdict.reason}")
    own = sequence_part(x).requires_grad_()
    x.requires_grad_()

    def alone() -> None:
        if not rank:
            step(one, x)

    calls = {"one": alone, "processes": lambda: step(part, own)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name in sorted(calls, reverse=bool(index % 2)):
            took = seconds(calls[name])
            if index:  # the first round warms up
                times[name].append(took)
    if not rank:
        ratios = [whole / shared for whole, shared in zip(times["one"], times["processes"], strict=True)]
        report: dict[str, Any] = {
            "sizes": sizes, "rounds": rounds, "gate": asdict(verdict),
            "seconds": {name: spread(found) for name, found in times.items()}, "speedup": spread(ratios),
            "environment": describe(),
        }  # fmt: skip
        write_json(Path(out), report)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens, a multiple of twice the processes")
    parser.add_argument("--max-lag", type=int, help="lags of the tables, by default the length")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in ("length", "processes", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.length % (2 * args.processes):
        parser.error(f"--length {args.length} must be a multiple of {2 * args.processes}, twice the processes")
    names = ("length", "hidden_size", "num_heads", "processes")
    sizes = {name: getattr(args, name) for name in names} | {"max_lag": args.max_lag or args.length}
    try:
        check_place(args.out)
    except OSError as error:
        parser.error(f"--out {error}")
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = int(opened.getsockname()[1])
    torch.multiprocessing.spawn(measure, (port, sizes, args.rounds, str(args.out)), nprocs=args.processes)
    report = json.loads(args.out.read_text())
    for name, t in (*report["seconds"].items(), ("speedup", report["speedup"])):
        print(f"{name:<10} {t['median']:8.3f}   quartiles {t['low']:.3f} to {t['high']:.3f}")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
