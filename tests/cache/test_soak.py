"""Twenty windows of tokens through a small model: memory stays flat and outputs stay right."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypermlp import HyperCache, HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig

WINDOW, LAYERS, STREAM = 64, 3, 20 * 64
# kept back by the allocator between two readings, whatever the library does
_RESIDENT_SLACK = 4 << 20


def tensor_bytes() -> int:
    """Bytes of every tensor that is alive, each storage once; garbage of other tests is none."""
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor}
    return sum(storage.nbytes() for storage in storages.values())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_model(mixer: str) -> LanguageModel:
    attention = HyperConfig(24, 2, mixer, qk_dim=8, mix_rank=3, max_lag=WINDOW, conv_size=4)
    model = LanguageModel(LanguageModelConfig(32, 24, LAYERS, attention), dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "softmax"])
def test_a_long_stream_is_flat_and_exact(mixer: str) -> None:
    model = make_model(mixer)
    tokens = torch.randint(32, (2, STREAM))
    sampled = {*range(0, STREAM, 61), WINDOW - 1, WINDOW, WINDOW + 1, STREAM - 1}
    cache, kept, held = HyperCache(), {}, []
    for position in range(STREAM):
        logits = model(tokens[:, position : position + 1], cache=cache)
        if position in sampled:
            kept[position] = logits[:, 0].clone()
        if position % WINDOW == WINDOW - 1:
            del logits
            outputs = sum(x.nbytes for x in kept.values())
            held.append((cache.nbytes, tensor_bytes() - outputs, resident_bytes()))
    one_shot = model(tokens)
    for position, logits in kept.items():
        torch.testing.assert_close(
            logits, one_shot[:, position], atol=1e-9, rtol=0, msg=lambda m, p=position: f"{p}: {m}"
        )
    # memory grows up to the window and what crop() may drop, which two windows are past
    settled = held[2:]
    for name, sizes, slack in zip(
        ("cache", "tensors", "process"), zip(*settled, strict=True), (0, 0, _RESIDENT_SLACK), strict=True
    ):
        assert max(sizes) <= 1.01 * sizes[0] + slack, f"{name} grew: {sizes}"
    assert cache.get_seq_length() == STREAM
    assert cache.nbytes <= LAYERS * 2 * 8 * (WINDOW + 64) * (24 + 24 + 24)


def test_the_measure_of_memory_sees_a_cache_that_grows() -> None:
    model = make_model("hyperglu")
    before, cache = tensor_bytes(), HyperCache()
    model(torch.randint(32, (2, WINDOW)), cache=cache)
    assert tensor_bytes() - before >= cache.nbytes
