"""What a training step keeps and computes, in closed form, against what PyTorch saves and counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypermlp import HyperConfig, MixConfig, build_layer
from hypermlp.budget import (
    count_backward_flops,
    count_block_backward_flops,
    count_block_flops,
    count_block_kept,
    count_flops,
    count_heads_bytes,
    count_kept,
    count_norm_kept,
    count_sequence_bytes,
    ring_bytes,
)
from hypermlp.layers.block import TransformerBlock
from tests.kept import kept_bytes

BATCH, TOKENS, HIDDEN = 3, 20, 32
CONFIGS: dict[str, dict[str, object]] = {
    "hyperglu": {"max_lag": 16, "mix_rank": 3},
    "hypermlp with rope": {"mixer": "hypermlp", "rope": True, "max_lag": 64, "qk_dim": 16, "bias": True},
    "no gates, no convolution": {"q_gate": False, "readout_mix": False, "conv_size": 0, "max_lag": 20},
    "no output gate": {"output_gate": False, "max_lag": 20, "norm": False},
    "no mixing": {"output_gate": False, "q_gate": False, "routing_mix": False, "readout_mix": False},
    "diagonals": {"max_lag": 9, "routing_mix": MixConfig(rank=0), "readout_mix": MixConfig(rank=2, diag=False)},
    "identity gates": {"gate_activation": "identity", "max_lag": 20},
    "relu": {"mixer": "relu", "rope": True, "q_gate": True, "conv_size": 3},
    "softmax": {"mixer": "softmax"},
    "softmax with all": {"mixer": "softmax", "rope": True, "conv_size": 4, "output_gate": True, "q_gate": True},
}
each_config = pytest.mark.parametrize("name", CONFIGS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def config_of(name: str) -> HyperConfig:
    return HyperConfig(HIDDEN, 2, **CONFIGS[name])  # type: ignore[arg-type]


def normal(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)


@each_config
@each_dtype
def test_a_layer_keeps_what_is_saved(name: str, dtype: torch.dtype) -> None:
    config = config_of(name)
    layer = build_layer(config, dtype=dtype)
    assert kept_bytes(layer, normal(dtype)) == count_kept(config, BATCH, TOKENS, itemsize=dtype.itemsize).total


@each_dtype
def test_the_operator_keeps_its_arguments_output_and_statistics(dtype: torch.dtype) -> None:
    """By hand, and with what is not the operator's counted by hand too."""
    config = config_of("hyperglu")  # 8 of queries and keys, 2 maps and 2 heads, rank 3
    count = count_kept(config, 1, 1, itemsize=dtype.itemsize)
    assert count.operator == dtype.itemsize * (8 + 8 + 32) + 4 * (32 + 4 * 3 + 2 + 2 * 3)
    gates = 8 + 32 + 4 * 3 + 2 * 3
    rounded = 32 if dtype == torch.bfloat16 else 0
    assert count.rest == dtype.itemsize * (32 + gates + 8 + 2 * 32 + 32 + rounded)
    assert count_kept(config, 5, 7, itemsize=dtype.itemsize).total == 35 * count.total


@each_dtype
def test_a_block_keeps_what_is_saved(dtype: torch.dtype) -> None:
    """The norms apart, which PyTorch's releases and devices compute in several ways."""
    config = config_of("hyperglu")
    block = TransformerBlock(config, 48, dtype=dtype)
    norm = nn.RMSNorm(HIDDEN, dtype=dtype)
    size = {"itemsize": dtype.itemsize, "fused_norm": False}
    count = count_block_kept(config, 48, BATCH, TOKENS, **size)  # type: ignore[arg-type]
    own = count_norm_kept(HIDDEN, BATCH * TOKENS, itemsize=dtype.itemsize, fused=False)
    # what it is multiplied by the weight to is the next layer's input
    assert kept_bytes(block, normal(dtype)) == count.total - 2 * own + 2 * kept_bytes(norm, normal(dtype))
    fused = count_block_kept(config, 48, BATCH, TOKENS, itemsize=dtype.itemsize)
    assert count.total - fused.total == 2 * BATCH * TOKENS * HIDDEN * (2 * 4 - dtype.itemsize)


@each_config
def test_backward_flops_are_those_pytorch_counts(name: str) -> None:
    """Convolutions apart, which it leaves out; of softmax it takes the whole square, and no map twice."""
    config = config_of(name)
    layer = build_layer(config, backend="chunked")
    with sdpa_kernel(SDPBackend.MATH):
        y = layer(normal())
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
    count = count_backward_flops(config, BATCH, TOKENS)
    expected = count.total - count.convolutions
    if config.mixer == "softmax":
        expected += BATCH * TOKENS**2 * 4 * (config.qk_dim + config.v_dim) - count.attention
        visible = BATCH * TOKENS * (TOKENS + 1)  # two for a multiply-add, half of the square
        assert count.attention == visible * (3 * config.qk_dim + 2 * config.v_dim)
    assert counter.get_total_flops() == expected
    assert count.convolutions == 2 * count_flops(config, BATCH, TOKENS).convolutions


def test_flops_of_a_block_and_its_backward() -> None:
    config = config_of("hyperglu")
    block = TransformerBlock(config, 48, backend="chunked")
    with FlopCounterMode(display=False) as counter:
        block(normal()).sum().backward()
    both = count_block_flops(config, 48, BATCH, TOKENS) + count_block_backward_flops(config, 48, BATCH, TOKENS)
    assert counter.get_total_flops() == both - 3 * count_flops(config, BATCH, TOKENS).convolutions


def test_bytes_by_hand() -> None:
    """Two processes' numbers are counted in ``tests/distributed``."""
    config = HyperConfig(HIDDEN, 2, max_lag=100)  # 8 of keys and 32 of values, 3 tokens before a chunk
    assert count_sequence_bytes(config, 3, 16, processes=4) == 2 * 3 * (3 * 4 * 40 + 2 * 3 * HIDDEN)
    window = HyperConfig(HIDDEN, 2, max_lag=3)
    assert count_sequence_bytes(window, 3, 16, processes=4) == 2 * 3 * (2 * 2 * 40 + 2 * 3 * HIDDEN)
    assert count_sequence_bytes(window, 3, 16, processes=1) == 0
    assert ring_bytes(1000, 4) == 750
    assert count_heads_bytes(config, 3, 16, processes=4, itemsize=4) == 2 * 4 * 3 * 16 * HIDDEN * 3 // 4


def test_errors() -> None:
    config = HyperConfig(16)
    with pytest.raises(ValueError, match="length=6 does not divide into 4 chunks: pad it"):
        count_kept(config, 1, 6, processes=2)
    with pytest.raises(ValueError, match="processes must be a positive integer, got 0"):
        count_sequence_bytes(config, 1, 6, processes=0)
    for options in ({"max_lag": 3}, {}):
        with pytest.raises(ValueError, match="without a mask alone: leave max_lag and processes out"):
            count_kept(HyperConfig(16, mixer="softmax", **options), 1, 8, processes=1 if options else 2)
    with pytest.raises(ValueError, match="intermediate_size must be a positive integer, got -1"):
        count_block_kept(config, -1, 1, 8)
