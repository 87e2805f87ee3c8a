"""The decoding kernels on a GPU: the interpreter's cases again, many tokens, and a captured step."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")
sys.path.insert(0, str(Path(__file__).parents[1] / "interpreted"))

from cases import TOLERANCE, error
from decode_cases import CASES, Decode

from hypermlp import HyperCache, HyperGLU

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def as_dtype(case: Decode, dtype: torch.dtype) -> Decode:
    """The case on the GPU with inputs of ``dtype``, and the rule's tile."""
    moved = case.to("cuda")
    moved.q, moved.k, moved.v = (x.to(dtype) for x in (moved.q, moved.k, moved.v))
    moved.mixes = [
        mix._replace(**{name: x.to(dtype) for name, x in mix._asdict().items() if isinstance(x, torch.Tensor)})
        for mix in moved.mixes
    ]
    moved.decode_tile = None
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_decode(name: str, dtype: torch.dtype) -> None:
    case = as_dtype(CASES[name], dtype)
    assert error(case.run(), case.expected()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("slots_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_and_the_same_bits_every_run(dtype: torch.dtype, slots_last: bool) -> None:
    case = Decode(T=3000, B=2, H=2, K=64, V=192, R=(16, 16), rows=2500, first=1501, splits=None, slots_last=slots_last)
    case = as_dtype(case, dtype)
    first = case.run()
    assert error(first, case.expected()) < 2 * TOLERANCE[dtype]
    for _ in range(5):
        assert torch.equal(first, case.run())


def test_a_captured_step_goes_on_at_any_length() -> None:
    torch.manual_seed(0)
    layer = HyperGLU(64, max_lag=40, layer_idx=0, backend="triton", device="cuda").requires_grad_(False)
    x = torch.randn(2, 60, 64, device="cuda")
    cache = HyperCache(static=True, max_length=64)
    layer(x[:, :20], cache=cache)
    token, graph = x[:, 20:21].clone(), torch.cuda.CUDAGraph()
    step = torch.compile(lambda new: layer(new, cache=cache), fullgraph=True)
    outputs = [step(token) for token in x[:, 20:25].split(1, 1)]
    with torch.cuda.graph(graph):
        captured = step(token)
    for new in x[:, 25:].split(1, 1):
        token.copy_(new)
        graph.replay()
        outputs.append(captured.clone())
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x)[:, 20:], atol=2e-3, rtol=2e-3)
