"""Files that run without this library, and tensors of other kinds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hypermlp import HyperCache, HyperConfig, HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops import hyper_attention
from tests.quick import some

LAYERS = [HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention]
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "HyperGLU": (HyperGLU, {}),
    "HyperMLP, rotated": (HyperMLP, {"rope": True}),
    "SoftmaxAttention": (SoftmaxAttention, {}),
    "bidirectional": (HyperGLU, {"causal": False}),
    "by position": (HyperGLU, {"layout": "position"}),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    cls, options = OPTIONS[name]
    return cls(16, qk_dim=8, max_lag=12, **options).eval()


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = mask[-1, 3] = 0
    return torch.randn(batch, length, 16), mask


def dynamic(*names: str) -> dict[str, Any]:
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    return {"dynamic_shapes": ({0: batch, 1: length},) * len(names), "input_names": names, "dynamo": True}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", some([*OPTIONS, "LanguageModel"], quick=["HyperGLU"]))
def test_an_onnx_file_gives_the_same_at_other_lengths(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs the file")
    length = 11 if name in ("bidirectional", "by position") else 30
    if name == "LanguageModel":
        model: Any = LanguageModel(LanguageModelConfig(50, 16, 2, HyperConfig(16, max_lag=12)))
        cases = [(torch.randint(50, (2, 7)),), (torch.randint(50, (3, 33)),)]
    else:
        model, cases = build(name), [inputs(2, 7), inputs(3, length)]
    names = ("x", "mask")[: len(cases[0])]
    torch.onnx.export(model, cases[0], tmp_path / "model.onnx", verbose=False, **dynamic(*names))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for case in cases:
        (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, case, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), model(*case).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_program_for_onnx_is_of_operators_of_pytorch_alone(name: str) -> None:
    layer, args = build(name), inputs(2, 7)

    def operators() -> set[str]:
        nodes = torch.export.export(layer, args).graph.nodes
        return {str(node.target).split(".")[0] for node in nodes if node.op == "call_function"}

    assert ("hypermlp" in operators()) == (name != "SoftmaxAttention")
    with mock.patch("torch.onnx.is_in_onnx_export", return_value=True):
        assert "hypermlp" not in operators()


@pytest.mark.parametrize("cls", LAYERS)
def test_every_member_can_be_looked_at(cls: Any) -> None:
    """As ``torch.jit.trace`` and debuggers do: a property may not raise."""
    for causal in (True, False):
        layer = cls(16, max_lag=12, causal=causal)
        members = dict(inspect.getmembers(layer))
        assert (members["cache_spec"] is None) == (not causal)
    with pytest.raises(ValueError, match=r"a bidirectional layer \(causal=False\) has no cache"):
        layer(torch.randn(1, 3, 16), cache=HyperCache())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_told_what_to_be(cls: Any, layout: torch.layout) -> None:
    layer, parts = cls(16, max_lag=12), [torch.randn(3, 16), torch.randn(5, 16)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(TypeError, match=r"hidden_states is a nested tensor: .*cu_seqlens=hidden_states.offsets\(\)"):
        layer(nested)
    if layout == torch.jagged:  # the advice works
        y = layer(nested.values()[None], cu_seqlens=nested.offsets())
        torch.testing.assert_close(y, torch.cat([layer(part[None]) for part in parts], dim=1))


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_a_dtensor_is_told_of_shard_heads() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, layer = distribute_tensor(torch.randn(2, 7, 16), mesh, [Shard(0)]), HyperGLU(16, max_lag=12)
        with pytest.raises(TypeError, match=r"hidden_states is a DTensor.*hypermlp\.distributed\.shard_heads"):
            distribute_module(layer, mesh)(x)
        q = distribute_tensor(torch.randn(2, 7, 4, 3), mesh, [Shard(0)])
        v = distribute_tensor(torch.randn(2, 7, 2, 3), mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"q is a DTensor.*hypermlp\.distributed\.shard_heads"):
            hyper_attention(q, q, v)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # that it is to go
def test_dynamic_quantisation_leaves_a_layer_as_it_is() -> None:
    """It asks for exact classes: the projections are a subclass of ``nn.Linear``."""
    layer, x = HyperGLU(16, 2, max_lag=12).eval(), torch.randn(2, 5, 16)
    model = torch.nn.Sequential(layer, torch.nn.Linear(16, 16)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert type(quantised[1]) is not torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(quantised[0](x), layer(x))
