"""A sequence spread over processes equals the whole on one, in values and in every gradient."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hypermlp import HyperCache, HyperConfig, MixConfig, build_layer
from hypermlp.distributed import full_state_dict, sequence_part, sequence_whole, shard_heads, shard_sequence
from hypermlp.layers import AttentionLayer
from hypermlp.layers.maps import attention_map
from hypermlp.models import LanguageModel, LanguageModelConfig
from tests.distributed.processes import WORLD, run_checks
from tests.distributed.sent import counted
from tests.helpers import assert_close, evaluate_layer

HIDDEN, TOKENS = 12, 32
RTOL = 1e-12
LAYERS: dict[str, dict[str, Any]] = {
    "hyperglu": {"mixer": "hyperglu", "num_heads": 2, "qk_dim": 8, "mix_rank": 3, "max_lag": 64, "bias": True},
    "window of more than a chunk": {"mixer": "hyperglu", "num_heads": 2, "qk_dim": 8, "mix_rank": 3, "max_lag": 19},
    "window of a chunk": {"mixer": "hyperglu", "num_heads": 2, "qk_dim": 8, "mix_rank": 2, "max_lag": 5},
    "window of one token": {"mixer": "hypermlp", "num_heads": 2, "qk_dim": 8, "mix_rank": 2, "max_lag": 1},
    "hypermlp with rope": {"mixer": "hypermlp", "num_heads": 4, "qk_dim": 8, "v_dim": 20, "max_lag": 40, "rope": True},
    "window with rope": {"mixer": "hypermlp", "num_heads": 2, "qk_dim": 8, "max_lag": 4, "rope": True},
    "some parts": {
        "mixer": "hyperglu", "num_heads": 2, "qk_dim": 8, "max_lag": 40, "q_gate": False, "readout_mix": False,
        "routing_mix": MixConfig(rank=3, diag=False), "conv_size": 0,
    },
    "by position": {"mixer": "hypermlp", "num_heads": 2, "qk_dim": 8, "max_lag": 40, "layout": "position"},
    "relu": {"mixer": "relu", "num_heads": 2, "conv_size": 3, "output_gate": True},
    "softmax": {"mixer": "softmax", "num_heads": 4, "qk_dim": 8, "rope": True, "bias": True},
    "softmax with a window": {"mixer": "softmax", "num_heads": 2, "conv_size": 4, "q_gate": True, "max_lag": 5},
}  # fmt: skip
INPUTS = ("whole rows", "padded", "packed", "packed and padded")


def randomised(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def layer_of(name: str, **options: Any) -> AttentionLayer:
    torch.manual_seed(0)
    config = HyperConfig(hidden_size=HIDDEN, **({"max_lag": 8} | LAYERS[name]))
    return randomised(build_layer(config, layer_idx=0, dtype=torch.float64, **options))


def sharded(name: str) -> AttentionLayer:
    layer = layer_of(name)
    shard_sequence(layer)
    return layer


def inputs(kind: str) -> dict[str, Tensor]:
    """Documents that end inside a chunk, at its end and after several, one empty; padding before, between and after."""
    found: dict[str, Tensor] = {}
    if kind.startswith("packed"):
        bounds = [1, 3, 3, 16, 17, 30] if kind == "packed" else [0, 9, 32]
        found["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    if kind.endswith("padded"):
        mask = torch.ones(1 if "cu_seqlens" in found else 2, TOKENS, dtype=torch.bool)
        mask[0, :6] = mask[-1, 12:15] = mask[-1, 29:] = False
        found["attention_mask"] = mask
    return found


def parts_of(kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sequence_part(x) if name == "attention_mask" else x for name, x in kwargs.items()}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for x in gradients.values():
        dist.all_reduce(x)
    return gradients


def check_gradients(name: str, kind: str) -> None:
    """Rows put together again; gradients of tables and of all else summed over the processes."""
    kwargs, batch = inputs(kind), 1 if kind.startswith("packed") else 2
    x, weight = normal(batch, TOKENS, HIDDEN), normal(batch, TOKENS, HIDDEN, seed=2)
    found = evaluate_layer(sharded(name), sequence_part(x), sequence_part(weight), **parts_of(kwargs))
    rows = {n: sequence_whole(y) for n, y in {"output": found.output, **found.streams}.items()}
    expected = evaluate_layer(layer_of(name), x, weight, **kwargs)
    assert_close(rows, {"output": expected.output, **expected.streams}, RTOL)
    assert_close(summed(found.shared), expected.shared, RTOL)


def check_bytes_sent() -> None:
    """A gather sends all rows of keys and values to all; a short window its reach to the neighbours, whatever T is."""
    world, rank = dist.get_world_size(), dist.get_rank()
    neighbours = (rank > 0) + (rank < world - 1)
    for length in (TOKENS, 2 * TOKENS):
        for name in ("hyperglu", "window of a chunk", "some parts"):
            layer, own = sharded(name), length // world
            config = layer.config
            width, taps = config.qk_dim + config.v_dim, max(config.conv_size - 1, 0) * HIDDEN
            x = sequence_part(normal(1, length, HIDDEN))
            for backward in (False, True):
                with counted() as sent:
                    y = layer(x.requires_grad_())
                if backward:
                    with counted() as sent:
                        y.sum().backward()
                window = name == "window of a chunk"
                everything = 0 if window else own * width * (world - 1)
                reach = (config.max_lag - 1) * width if window else 0
                expected = {"gather": 0, "scatter": 0, "neighbours": neighbours * (taps + reach)}
                expected["scatter" if backward else "gather"] = everything
                assert sent == expected, (name, length, backward, sent, expected)


def language_model(max_lag: int = 40, rope: bool = False) -> LanguageModel:
    torch.manual_seed(3)
    attention = HyperConfig(hidden_size=16, num_heads=4, qk_dim=16, mix_rank=2, max_lag=max_lag, rope=rope)
    return randomised(LanguageModel(LanguageModelConfig(40, 16, 2, attention), dtype=torch.float64))


def check_language_model(max_lag: int, rope: bool, bounds: list[int] | None) -> None:
    """Loss and gradients of a model, recomputed in the backward, copied, and by DDP, which takes means."""

    def loss(model: Any, x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(x, **kwargs).flatten(0, 1), targets.flatten())

    ids = torch.randint(40, (1, TOKENS + 1), generator=torch.Generator().manual_seed(4))
    x, targets = ids[:, :-1], ids[:, 1:]
    kwargs = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    model, whole = language_model(max_lag, rope), language_model(max_lag, rope)
    expected_loss = loss(whole, x, targets)
    expected_loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    shard_sequence(model)
    for way in ("summed", "recomputed", "DDP"):
        copy = deepcopy(model)
        run: Any = DistributedDataParallel(copy) if way == "DDP" else copy
        run = partial(checkpoint, run, use_reentrant=False) if way == "recomputed" else run
        own = loss(run, sequence_part(x), sequence_part(targets))
        (own if way == "DDP" else own / dist.get_world_size()).backward()
        grads = {name: p.grad for name, p in copy.named_parameters()}
        mean = summed({"loss": own.detach() / dist.get_world_size()})
        assert_close(mean, {"loss": expected_loss}, RTOL)
        assert_close(grads if way == "DDP" else summed(grads), expected, RTOL)


def check_second_gradients() -> None:
    """By the reference, through the messages of both kinds."""

    def penalty(layer: AttentionLayer, x: Tensor, weight: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((layer(x) * weight).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    x, weight = normal(1, TOKENS, HIDDEN), normal(1, TOKENS, HIDDEN, seed=2)
    for name in ("hyperglu", "window of a chunk"):
        layer = layer_of(name, backend="reference")
        expected = penalty(layer, x, weight)
        shard_sequence(layer)
        found = sequence_whole(penalty(layer, sequence_part(x), sequence_part(weight)))
        assert_close({name: found}, {name: expected}, 1e-10)


def check_compiled() -> None:
    x, weight = normal(1, TOKENS, HIDDEN), normal(1, TOKENS, HIDDEN, seed=2)
    for name in ("hyperglu", "window of a chunk"):
        layer = sharded(name)
        expected = evaluate_layer(layer, sequence_part(x), sequence_part(weight)).named()
        compiled: Any = torch.compile(layer, backend="aot_eager")  # messages to neighbours break the graph
        found = evaluate_layer(compiled, sequence_part(x), sequence_part(weight)).named()
        assert_close({key.replace("_orig_mod.", ""): y for key, y in found.items()}, expected, RTOL)


def check_parts_and_wholes() -> None:
    x = normal(2, TOKENS, 3)
    world, rank = dist.get_world_size(), dist.get_rank()
    own = sequence_part(x)
    size = TOKENS // (2 * world)
    assert torch.equal(own, torch.cat([x[:, n * size : (n + 1) * size] for n in (rank, 2 * world - 1 - rank)], 1))
    assert torch.equal(sequence_whole(own), x)
    assert torch.equal(sequence_whole(sequence_part(x[0], dim=0), dim=0), x[0])
    own.requires_grad_()
    weight = normal(2, TOKENS, 3, seed=5)
    (sequence_whole(own) * weight).sum().backward()
    assert torch.equal(own.grad, sequence_part(weight))


def check_errors() -> None:
    world = dist.get_world_size()
    with pytest.raises(ValueError, match=rf"33 tokens does not divide into {2 * world} chunks.*pad it on the right to"):
        sequence_part(normal(1, 33, 2))
    with pytest.raises(ValueError, match="no attention layer"):
        shard_sequence(nn.Linear(2, 2))
    layer = sharded("hyperglu")
    with pytest.raises(ValueError, match="is sharded already"):
        shard_sequence(layer)
    bidirectional = build_layer(HyperConfig(HIDDEN, mixer="hypermlp", max_lag=40, causal=False))
    with pytest.raises(ValueError, match=r"1 is bidirectional \(causal=False\)"):
        shard_sequence(nn.ModuleList([fresh := layer_of("relu"), bidirectional]))
    assert fresh.over_processes is None, "nothing is changed"
    with pytest.raises(ValueError, match="backend='triton', whose kernels have no offset"):
        shard_sequence(layer_of("hyperglu", backend="triton"))
    swapped = nn.ModuleDict({"self_attn": nn.Module()})
    with mock.patch.object(nn.Module, "__module__", "hypermlp.integrations.hosts.some"):
        swapped["self_attn"].mixer = layer_of("relu")
        with pytest.raises(ValueError, match=r"self_attn\.mixer stands in a swapped model"):
            shard_sequence(swapped)
    with pytest.raises(ValueError, match="call the layer itself"):
        attention_map(layer, normal(1, 8, HIDDEN))
    with pytest.raises(ValueError, match="no cache"):
        layer(normal(1, 8, HIDDEN), cache=HyperCache())
    with pytest.raises(ValueError, match="7 tokens, and sequence_part gives two chunks"):
        layer(normal(1, 7, HIDDEN))
    with pytest.raises(ValueError, match="chunks of 2 tokens are shorter than the convolutions' reach of 3"):
        layer(normal(1, 4, HIDDEN))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\] = \(1, 8\), got \(1, 32\)"):
        layer(normal(1, 8, HIDDEN), torch.ones(1, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"cu_seqlens must lie within 0 and {8 * world} tokens"):
        layer(normal(1, 8, HIDDEN), cu_seqlens=torch.tensor([0, 1000]))
    with pytest.raises(ValueError, match="does not fit position-indexed tables of 40 rows"):
        sharded("by position")(normal(1, 64, HIDDEN))


def check_context_parallel_of_torch_is_refused() -> None:
    """It gives each process some tokens, and knows nothing of our layers: no error, and a wrong loss."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    for model in (language_model(), layer_of("softmax")):
        x = torch.randint(40, (1, TOKENS)) if isinstance(model, LanguageModel) else normal(1, TOKENS, HIDDEN)
        with (
            context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]),
            pytest.raises(RuntimeError, match="shard_sequence"),
        ):
            model(x)
        assert model(x).shape[1] == TOKENS, "and not after it"


def check_with_heads() -> None:
    """Heads over one dimension of a mesh, the sequence over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("sequence", "heads"))
    x, weight = normal(2, TOKENS, HIDDEN), normal(2, TOKENS, HIDDEN, seed=2)
    layer = layer_of("hyperglu")
    shard_heads(layer, mesh["heads"])
    shard_sequence(layer, mesh["sequence"])
    own, own_weight = (sequence_part(y, mesh["sequence"]) for y in (x, weight))
    found = evaluate_layer(layer, own, own_weight)
    expected = evaluate_layer(layer_of("hyperglu"), x, weight)
    rows = {n: sequence_whole(y, mesh["sequence"]) for n, y in {"output": found.output, **found.streams}.items()}
    assert_close(rows, {"output": expected.output, **expected.streams}, RTOL)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            dist.all_reduce(found.shared[name], group=mesh.get_group("sequence"))
            parameter.copy_(found.shared[name])
    assert_close(full_state_dict(layer), expected.shared, RTOL)


QUICK: dict[str, Callable[[], None]] = {
    **{f"{name}, {kind}": partial(check_gradients, name, kind) for name in LAYERS for kind in INPUTS},
    "bytes sent": check_bytes_sent,
    "language model": partial(check_language_model, 40, False, None),
    "language model, rope": partial(check_language_model, 40, True, None),
    "language model, window": partial(check_language_model, 5, False, None),
    "language model, packed": partial(check_language_model, 40, True, [0, 5, 13, 14, 30]),
    "second gradients": check_second_gradients,
    "parts and wholes": check_parts_and_wholes,
    "errors": check_errors,
    "context_parallel of PyTorch": check_context_parallel_of_torch_is_refused,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(QUICK, tmp_path_factory.mktemp("sequence"))


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_equal_one(name: str, found: dict[str, list[str]]) -> None:
    assert not found[name], "\n".join(found[name])


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    checks = {**QUICK, "with heads": check_with_heads, "compiled": check_compiled}
    found = run_checks(checks, tmp_path_factory.mktemp("sequence4"), 2 * WORLD)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)


def test_without_a_process_group() -> None:
    for call in (lambda: shard_sequence(layer_of("relu")), lambda: sequence_part(normal(1, 4, 2))):
        with pytest.raises(ValueError, match="init_process_group"):
            call()
