"""The tool that counts a layer's traffic, on operators whose bytes are known."""

import pytest
import torch
import traffic
from traffic import ByteCounter, Traffic, count, layer_traffic

from hypermlp.layers.short_conv import ShortConv
from hypermlp_lab.bench.layers import LayerCase, hyperglu, softmax_wide


def counted(function, *inputs: torch.Tensor) -> int:
    with ByteCounter() as counter:
        function(*inputs)
    return counter.total


def test_an_operator_counts_its_inputs_and_its_output() -> None:
    x, row = torch.zeros(8, 16), torch.zeros(16)
    assert counted(torch.addcmul, x, x, row) == 4 * (3 * 8 * 16 + 16)
    assert counted(torch.mul, x.bfloat16(), x.bfloat16()) == 2 * 3 * 8 * 16
    assert counted(torch.matmul, x, x.T) == 4 * (2 * 8 * 16 + 8 * 8)
    assert counted(lambda y: y.double(), x) == 12 * 8 * 16
    assert counted(lambda y: y.add_(1), x) == 8 * 8 * 16


def test_views_and_unwritten_memory_are_free() -> None:
    x = torch.zeros(8, 16)
    for view in (lambda y: y[:4].T.reshape(16, 4).unsqueeze(0), torch.empty_like, lambda y: y.expand(3, 8, 16)):
        assert counted(view, x) == 0
    assert counted(torch.zeros_like, x) == 4 * 8 * 16
    assert counted(torch.clone, torch.zeros(16).expand(8, 16)) == 4 * (16 + 8 * 16)


def test_a_backward_is_counted_apart() -> None:
    x = torch.zeros(8, 16)
    assert count(torch.mul, [x, x]) == Traffic(4 * 3 * x.numel(), 2 * 4 * 3 * x.numel())
    linear = torch.nn.Linear(16, 4, bias=False)
    products = 4 * (8 * 16 + 4 * 16 + 8 * 4)
    assert count(linear, [x], list(linear.parameters())) == Traffic(products, 2 * products)


@pytest.mark.parametrize(("backend", "expected"), [("chunked", (13, 47)), ("triton", (2, 3))])
def test_what_the_readme_says_of_a_convolution(backend: str, expected: tuple[int, int]) -> None:
    """In passes over ``[B, T, D]``, forward and backward."""
    case = LayerCase(length=4096, hidden_size=1024, batch=4, dtype=torch.bfloat16)
    with traffic.pretended_gpu():
        conv = ShortConv(1024, 4, dtype=case.dtype)
        x = torch.empty(4, 4096, 1024, dtype=case.dtype)
        found = count(lambda y: conv(y, backend=backend), [x], list(conv.parameters()))
    passes = found.forward / (2 * x.numel()), found.backward / (2 * x.numel())
    assert passes == pytest.approx(expected, abs=0.02)


def test_parts_add_up_and_the_kernels_move_less() -> None:
    case = LayerCase(length=256, hidden_size=128, batch=2, dtype=torch.bfloat16)
    builds = {"chunked": hyperglu("chunked"), "triton": hyperglu("triton"), "softmax": softmax_wide}
    found = {name: layer_traffic(build, case) for name, build in builds.items()}
    for parts in found.values():
        whole = parts.pop("whole layer")
        assert sum(parts.values(), Traffic()) == whole
        assert all(part.forward >= 0 and part.backward >= 0 for part in parts.values())
    assert found["chunked"]["operator"] == found["triton"]["operator"]
    assert 10 * found["triton"]["convolutions"].backward < found["chunked"]["convolutions"].backward
    assert found["softmax"]["convolutions"] == found["softmax"]["gates"] == Traffic()
