"""The decoding kernels in Triton's interpreter against the reference in float64.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

import numpy as np
import pytest
import repairs
import torch
from cases import HOLES, TOLERANCE, error
from decode_cases import CASES, Decode
from torch._dynamo.testing import CompileCounterWithBackend
from triton.runtime.interpreter import InterpreterBuilder

from hypermlp import HyperCache, HyperConfig, HyperGLU
from hypermlp.cache import CacheSpec
from hypermlp.ops import triton as triton_path
from hypermlp.ops.library import PATHS
from hypermlp.ops.triton import triton_decode
from hypermlp_kernels import launch
from hypermlp_kernels.launch_decode import decode

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel must write starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.parametrize("name", CASES)
def test_decode(name: str) -> None:
    case = CASES[name]
    o = case.run()
    assert o.dtype == case.dtype
    assert o.shape == (case.B, 1, case.H, case.V)
    expected = case.expected()
    assert error(o, expected) < TOLERANCE[case.dtype]
    if case.mask_tensor is not None:
        assert not o[~case.mask_tensor.any(1)].any()


@pytest.mark.parametrize("name", ["65-keys", "wrapped", "static-wrapped-holes", "slots-last-wrapped", "bfloat16"])
def test_same_bits_every_run(name: str) -> None:
    case = CASES[name]
    assert torch.equal(case.run(), case.run())


@pytest.mark.parametrize("stream", ["q", "k", "v"])
@pytest.mark.parametrize("options", [{"mask": [[1] * 40, [0] * 25 + [1] * 15], "B": 2}, {"rows": 12, "B": 2}])
def test_nonfinite_is_seen_or_not(stream: str, options: dict) -> None:
    """A NaN within reach is not lost, and one beyond it (a neighbour, the window, a hidden token) is not met."""
    case = Decode(dtype=torch.float32, first=9, slots_last=True, **options)
    clean = case.run()
    (q, keys, values, *mixes), arguments = case.arguments()
    touched = {"q": q[0, 0, 0], "k": keys[-1][0, 0, -1], "v": values[-1][0, 0, -1]}[stream]
    touched[1] = float("nan")
    o = decode(q, keys, values, *mixes, **arguments)
    assert torch.isnan(o[0, 0, 0, 1 if stream == "v" else slice(None)]).all()
    assert torch.equal(o[1], clean[1])


class Loads:
    """Addresses that kernels load from, as the interpreter meets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[np.ndarray] = []
        load = InterpreterBuilder.create_masked_load

        def recorded(builder, pointers, mask, *rest):
            self.addresses.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
            return load(builder, pointers, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded)

    def of(self, memory: torch.Tensor) -> np.ndarray:
        """How often each element of ``memory`` was read, in its own shape."""
        first, size = memory.untyped_storage().data_ptr(), memory.element_size()
        found = np.concatenate([x.ravel() for x in self.addresses]).astype(np.int64) - first
        found = found[(found >= 0) & (found < memory.untyped_storage().nbytes())]
        counts = np.bincount(found // size, minlength=memory.untyped_storage().nbytes() // size)
        return torch.from_numpy(counts).as_strided(memory.shape, memory.stride(), memory.storage_offset())


@pytest.mark.parametrize("slots_last", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_keys_and_values_are_read_once(slots_last: bool, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element that the query sees once, and nothing beside: not the room left, not what passed the window."""
    options = {"T": 21, "static": True, "spare": 30} if static else {"T": 70, "rows": 49, "first": 42}
    case = Decode(H=2, K=5, V=20, slots_last=slots_last, dtype=torch.bfloat16, splits=3, **options)
    (q, keys, values, *mixes), arguments = case.arguments()
    loads = Loads(monkeypatch)
    decode(q, keys, values, *mixes, **arguments)
    for parts in (keys, values):
        tokens = sum(int(loads.of(part).sum()) for part in parts)
        assert tokens == case.B * parts[0].shape[1] * parts[0].shape[3] * min(case.T, 49)
        for part in parts:
            assert torch.equal(loads.of(part) > 0, ~part.isnan())
            assert int(loads.of(part).max()) == 1


def test_hidden_tokens_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Decode(B=2, mask=HOLES)
    (q, keys, values, *mixes), arguments = case.arguments()
    loads = Loads(monkeypatch)
    decode(q, keys, values, *mixes, **arguments)
    for part in (keys[0], values[0]):
        assert torch.equal(loads.of(part), case.mask_tensor[:, None, :, None].expand(part.shape).long())


def test_bytes_of_a_token() -> None:
    """What the README says a cached token costs at D = 1024 with two heads: 2560 bytes, not softmax's 4096."""
    spec = CacheSpec.of(HyperConfig(1024, 2, max_lag=64))
    assert 2 * spec.numbers_per_token == 2560
    assert 2 * CacheSpec.of(HyperConfig(1024, 16, "softmax")).numbers_per_token == 4096


@pytest.fixture
def _chunked_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is the forward kernels' own affair."""
    monkeypatch.setitem(PATHS, "triton", PATHS["triton"]._replace(forward=PATHS["chunked"].forward))


def make_layer(max_lag: int, **options: str) -> HyperGLU:
    torch.manual_seed(0)
    layer = HyperGLU(8, 1, mix_rank=3, max_lag=max_lag, layer_idx=0, backend="triton", dtype=torch.float64, **options)
    return layer.requires_grad_(False)


LAYERS = {
    "window": (make_layer(6), None, HyperCache(max_crop=2)),
    "static": (make_layer(6), None, HyperCache(static=True, max_length=20)),
    "position": (make_layer(16, layout="position"), [[0] * 3 + [1] * 7, [1] * 10], HyperCache()),
    "left": (make_layer(16), [[0] * 3 + [1] * 7, [0] + [1] * 9], HyperCache()),
    "holes": (make_layer(6), [[1] * 7 + [0] + [1] * 2, [1] * 10], HyperCache(max_crop=1)),
}


@pytest.mark.usefixtures("_chunked_prompt")
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_steps_equal_one_shot(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, mask, cache = LAYERS[kind]
    calls, kernels = [], triton_path._decode
    monkeypatch.setattr(triton_path, "_decode", lambda *args: calls.append(1) or kernels(*args))
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    masks = [None] * 6 if mask is None else [mask[:, :5], *mask[:, 5:].split(1, 1)]
    parts = [x[:, :5], *x[:, 5:].split(1, 1)]
    actual = torch.cat([layer(part, valid, cache=cache) for part, valid in zip(parts, masks, strict=True)], dim=1)
    assert len(calls) == 5
    layer.backend = "reference"
    torch.testing.assert_close(actual, layer(x, mask), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("_chunked_prompt")
def test_static_step_compiles_once() -> None:
    layer, x = make_layer(6), torch.randn(2, 10, 8, dtype=torch.float64)
    cache = HyperCache(static=True, max_length=20)
    layer(x[:, :5], cache=cache)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda token: layer(token, cache=cache), backend=counter, fullgraph=True)
    actual = torch.cat([step(token) for token in x[:, 5:].split(1, 1)], dim=1)
    assert counter.frame_count == 1
    layer.backend = "reference"
    torch.testing.assert_close(actual, layer(x)[:, 5:], rtol=1e-6, atol=1e-8)


def test_opcheck() -> None:
    (q, keys, values, *mixes), options = CASES["wrapped"].arguments()
    keys, values = [part.mT.flatten(0, 1) for part in keys], [part.flatten(0, 1) for part in values]
    tables = [x for mix in mixes for x in (*mix[:3], mix.core.squeeze(1))]
    where = keys, values, None, None, None
    arguments = (q.flatten(1), *where, *tables, True, True, "glu", True, 1e-12, options["options"].max_lag)
    torch.library.opcheck(triton_decode, arguments)


def test_segments_of_two_memories() -> None:
    (q, keys, values, *mixes), options = CASES["wrapped"].arguments()
    keys[0], values[1] = keys[0].clone(), values[1].mT.contiguous().mT
    torch.testing.assert_close(decode(q, keys, values, *mixes, **options), CASES["wrapped"].run(), rtol=1e-9, atol=0)


def test_a_ring_is_one_segment() -> None:
    (q, keys, values, *mixes), options = CASES["wrapped"].arguments()
    with pytest.raises(ValueError, match="length needs one segment"):
        decode(q, keys, values, *mixes, **options | {"length": torch.tensor(50)})
