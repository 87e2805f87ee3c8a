"""A step with a static cache compiles once, whatever the length, and keeps its addresses."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hypermlp import HyperCache, HyperConfig, build_layer


def test_static_step_compiles_once_and_equals_one_shot() -> None:
    layer = build_layer(HyperConfig(12, 2, max_lag=9, qk_dim=8), layer_idx=0, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 25, 12, dtype=torch.float64)
    expected = layer(x)
    cache = HyperCache(static=True, max_length=32)
    layer(x[:, :5], cache=cache)
    addresses = [tensor.data_ptr() for tensor in cache.layers[0].tensors().values()]
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(new: torch.Tensor) -> torch.Tensor:
        return layer(new, cache=cache)

    steps = torch.cat([step(x[:, i : i + 1]) for i in range(5, 25)], dim=1)
    torch.testing.assert_close(steps, expected[:, 5:], atol=1e-10, rtol=0)
    assert counter.frame_count == 1
    assert [tensor.data_ptr() for tensor in cache.layers[0].tensors().values()] == addresses
    # Inductor would write a product of one row out as a loop
    assert not [node for graph in counter.graphs for node in graph.graph.nodes if node.target is torch.bmm]


def test_layers_of_different_sizes_compile_through_one_function() -> None:
    for qk_dim in (8, 16):
        config = HyperConfig(16, 2, max_lag=9, qk_dim=qk_dim)
        layer = build_layer(config, layer_idx=0, dtype=torch.float64).requires_grad_(False)
        x, cache = torch.randn(1, 7, 16).double(), HyperCache(static=True, max_length=16)
        layer(x[:, :6], cache=cache)
        step = torch.compile(lambda new, layer=layer, cache=cache: layer(new, cache=cache), backend="aot_eager")
        torch.testing.assert_close(step(x[:, 6:]), layer(x)[:, 6:], atol=1e-12, rtol=0)
