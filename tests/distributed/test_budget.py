"""What one of several processes sends and keeps, in closed form, against what is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import strong_scaling
from hypermlp import HyperConfig, build_layer
from hypermlp.budget import count_heads_bytes, count_kept, count_sequence_bytes
from hypermlp.distributed import sequence_part, shard_heads, shard_sequence
from hypermlp.layers import AttentionLayer
from hypermlp_lab.bench.gate import Verdict, judge
from tests.distributed.processes import WORLD, run_checks
from tests.distributed.sent import counted
from tests.kept import kept_bytes

BATCH, TOKENS, HIDDEN = 2, 64, 16
CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {"max_lag": 400, "mix_rank": 3},
    "window": {"max_lag": 7, "mix_rank": 3},
    "window of more than a chunk": {"max_lag": 40},
    "rope, no convolution": {"mixer": "hypermlp", "rope": True, "conv_size": 0, "max_lag": 400},
    "relu": {"mixer": "relu", "output_gate": True},
}


def config_of(name: str) -> HyperConfig:
    return HyperConfig(HIDDEN, 2, **({"qk_dim": 8} | CONFIGS[name]))


def sharded(name: str, dtype: torch.dtype = torch.float32) -> AttentionLayer:
    layer = build_layer(config_of(name), dtype=dtype)
    shard_sequence(layer)
    return layer


def rows(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return sequence_part(torch.randn(BATCH, length, HIDDEN, dtype=dtype)).requires_grad_()


def check_kept() -> None:
    for name in CONFIGS:
        for dtype in (torch.float32, torch.bfloat16):
            for length in (TOKENS, 2 * TOKENS):
                count = count_kept(
                    config_of(name), BATCH, length, itemsize=dtype.itemsize, processes=dist.get_world_size()
                )
                found = kept_bytes(sharded(name, dtype), rows(length, dtype))
                assert found == count.total, (name, dtype, length, found, count)


def check_sequence_bytes() -> None:
    """Forward and backward, of a process with as many neighbours as there can be."""
    world, rank = dist.get_world_size(), dist.get_rank()
    inside = world == 2 or 0 < rank < world - 1
    for name in CONFIGS:
        for length in (TOKENS, 2 * TOKENS):
            layer, x = sharded(name), rows(length)
            with counted() as forward:
                y = layer(x)
            with counted() as backward:
                y.sum().backward()
            expected = count_sequence_bytes(config_of(name), BATCH, length, itemsize=4, processes=world)
            for sent in (forward, backward):
                found = 4 * sum(sent.values())
                assert found == expected if inside else found <= expected, (name, length, found, expected)


def check_heads_bytes() -> None:
    """What is summed, of which a ring sends each part twice."""
    world, sent = dist.get_world_size(), []
    all_reduce = dist.all_reduce

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(x.numel() * x.itemsize)
        return all_reduce(x, *args, **kwargs)

    layer = build_layer(HyperConfig(HIDDEN, 4, max_lag=9, conv_size=0))
    shard_heads(layer)
    x = torch.randn(BATCH, TOKENS, HIDDEN, requires_grad=True)
    with mock.patch.object(dist, "all_reduce", counting):
        y = layer(x)
        forward = sent.copy()
        y.sum().backward()
    assert len(forward) == 1
    assert sent == 2 * forward
    expected = count_heads_bytes(layer.config, BATCH, TOKENS, itemsize=4, processes=world)
    assert 2 * forward[0] * (world - 1) / world == expected


def check_gate_of_the_scaling() -> None:
    """It passes what is right, and finds one gradient that is wrong by a thousandth."""
    sizes = {"hidden_size": HIDDEN, "num_heads": 2, "max_lag": TOKENS}
    one, part = strong_scaling.layer_of(sizes), strong_scaling.layer_of(sizes)
    shard_sequence(part)
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))

    def verdict() -> Verdict:
        return judge("", partial(strong_scaling.errors, one, part, x))

    assert verdict().passed, verdict()
    part.v_proj.weight.register_hook(lambda gradient: 1.001 * gradient)
    assert not verdict().passed
    assert verdict().worst_gradient == "v_proj.weight"


CHECKS: dict[str, Callable[[], None]] = {
    "kept": check_kept,
    "sequence bytes": check_sequence_bytes,
    "heads bytes": check_heads_bytes,
    "gate of the scaling": check_gate_of_the_scaling,
}


@pytest.mark.parametrize("world", [WORLD, pytest.param(2 * WORLD, marks=pytest.mark.slow)])
def test_counts_of_processes(world: int, tmp_path: Path) -> None:
    found = run_checks(CHECKS, tmp_path, world)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)


@pytest.mark.slow
def test_strong_scaling_is_measured(tmp_path: Path) -> None:
    """The benchmark's script on a tiny sequence: it compares before it times, and says what with."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "strong_scaling.py"
    arguments = ["--length", "64", "--hidden-size", "16", "--rounds", "3", "--out", str(tmp_path / "out.json")]
    subprocess.run([sys.executable, str(script), *arguments], check=True)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["gate"]["passed"]
    assert report["speedup"]["low"] <= report["speedup"]["median"] <= report["speedup"]["high"]
    assert report["environment"]["torch"] == torch.__version__


def test_memory_of_a_process_is_linear_in_its_rows() -> None:
    """By the counts that ``check_kept`` measures: exactly so of a short window; else all keys and values come to it."""
    pair = 2 * (8 + HIDDEN)  # bytes of a token's keys and values

    def kept(max_lag: int, length: int, processes: int) -> int:
        return count_kept(HyperConfig(HIDDEN, 2, qk_dim=8, max_lag=max_lag), 1, length, processes=processes).total

    for processes in (4, 8):
        assert kept(7, 1024 * processes, processes) == kept(7, 2048, 2)
        more = 1024 * (processes - 2) * pair
        assert kept(10**6, 1024 * processes, processes) == kept(10**6, 2048, 2) + more
    steps = [kept(7, length, 2) for length in (1024, 2048, 3072)]
    assert steps[2] - steps[1] == steps[1] - steps[0]
    halo = 2 * (
        6 * pair + 3 * 3 * 2 * HIDDEN
    )  # of two chunks: keys and values, three copies of the convolutions' reach
    assert 2 * steps[0] - steps[1] == halo, "what comes from neighbours does not grow"
