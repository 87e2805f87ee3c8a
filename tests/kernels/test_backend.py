"""``backend="triton"`` where there is no GPU, and what importing hypermlp costs."""

import pytest
import torch

from hypermlp import HyperCache, HyperGLU
from hypermlp.ops import hyper_attention, native


def streams(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(1, 4, heads, 4, dtype=dtype) for heads in (2, 2, 1)]


def test_a_cpu_tensor_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .* the input is on cpu"):
        hyper_attention(*streams(), backend="triton")


def test_a_step_with_a_cache_is_refused_with_the_reason() -> None:
    layer, cache, x = HyperGLU(8, max_lag=4, layer_idx=0), HyperCache(), torch.randn(1, 3, 8)
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
        layer.backend = "triton"
        with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .* the input is on cpu"):
            layer(x[:, 2:], cache=cache)


def test_auto_takes_no_triton_on_the_cpu() -> None:
    x = streams()
    path = "chunked" if native.unavailable(x[0]) else "native"
    assert torch.equal(hyper_attention(*x, backend="auto"), hyper_attention(*x, backend=path))
    x = streams(torch.float64)
    assert torch.equal(hyper_attention(*x, backend="auto"), hyper_attention(*x, backend="chunked"))


def test_a_triton_without_gather_is_refused_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    language = pytest.importorskip("triton", reason="triton is for Linux alone, and make test has it there").language
    monkeypatch.delattr(language, "gather", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .* need Triton 3.3.* this is 3\."):
        hyper_attention(*streams(), backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float64_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="the input is float64"):
        hyper_attention(*(x.cuda() for x in streams(torch.float64)), backend="triton")
