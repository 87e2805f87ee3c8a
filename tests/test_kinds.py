"""Every public function, given something of another kind, says which argument it is: no AttributeError, no silence."""

from __future__ import annotations

import copy
import enum
import importlib
import inspect as python_inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hypermlp
from hypermlp import (
    HyperCache,
    HyperConfig,
    HyperGLU,
    MixConfig,
    budget,
    distributed,
    generation,
    inspect,
    integrations,
)
from hypermlp.cache import CacheSpec, LayerCache, StaticLayerCache
from hypermlp.inspect import HeadMaps
from hypermlp.layers.maps import attention_map
from hypermlp.models import LanguageModel, LanguageModelConfig, next_token_loss
from hypermlp.ops.short_conv import short_conv

MODULES = ["", "budget", "cache", "distributed", "generation", "inspect", "integrations", "layers", "models", "ops"]
CONFIG = HyperConfig(8, max_lag=4)
LAYER = HyperGLU(8, max_lag=4, layer_idx=0)
BY_POSITION = HyperGLU(8, max_lag=16, causal=False)
MODEL = LanguageModel(LanguageModelConfig(9, 8, 1, CONFIG))
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
IDS, X, LOGITS = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 8), torch.randn(2, 9)
CALL = inspect.record(LAYER, X)[0]
MAPS: HeadMaps = inspect.head_maps(CALL)
STREAMS = {"q": torch.randn(1, 3, 4, 2), "k": torch.randn(1, 3, 4, 2), "v": torch.randn(1, 3, 2, 2)}
SIZES = {"batch_size": 1, "length": 8}
PAIR = {"reference": CONFIG, "other": CONFIG}
SENT = SIZES | {"itemsize": 2, "processes": 2}
FILLED = HyperCache()
with torch.no_grad():
    LAYER(X, cache=FILLED)


class Known(integrations.Adapter):
    def describe(self, module: nn.Module) -> integrations.Host:
        return integrations.Host(8, 2, max_length=4)


# a call that is right, each argument by its name; left out are those of torch (device, dtype, generator)
CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (budget.count_parameters, {"config": CONFIG}),
    (budget.count_flops, {"config": CONFIG, **SIZES}),
    (budget.count_backward_flops, {"config": CONFIG, **SIZES}),
    (budget.count_block_parameters, {"config": CONFIG, "intermediate_size": 8}),
    (budget.count_block_flops, {"config": CONFIG, "intermediate_size": 8, **SIZES}),
    (budget.count_block_backward_flops, {"config": CONFIG, "intermediate_size": 8, **SIZES}),
    (budget.count_kept, {"config": CONFIG, **SENT}),
    (budget.count_block_kept, {"config": CONFIG, "intermediate_size": 8, **SENT, "fused_norm": True}),
    (budget.count_norm_kept, {"hidden_size": 8, "rows": 3, "itemsize": 2, "fused": True}),
    (budget.count_sequence_bytes, {"config": CONFIG, **SENT}),
    (budget.count_heads_bytes, {"config": CONFIG, **SENT}),
    (budget.ring_bytes, {"size": 8, "processes": 2}),
    (budget.match_parameters, {**PAIR, "how": "widen", "tolerance": 0.1, "min_qk_width": 1}),
    (
        budget.match_intermediate_size,
        {**PAIR, "intermediate_size": 8, "flops_at": 4, "multiple_of": 1, "tolerance": 0.1},
    ),
    (CacheSpec.of, {"config": CONFIG}),
    (LayerCache, {"spec": CacheSpec.of(CONFIG), "max_crop": 1, "max_length": 4}),
    (StaticLayerCache, {"spec": CacheSpec.of(CONFIG), "max_length": 4}),
    (HyperCache, {"max_crop": 1, "max_length": 4, "static": False}),
    (HyperCache().layer, {"layer_idx": 0, "spec": CacheSpec.of(CONFIG)}),
    (FILLED.crop, {"lengths": 3}),
    (FILLED.reorder, {"indices": torch.tensor([0])}),
    (FILLED.select, {"indices": torch.tensor([0])}),
    (FILLED.repeat, {"times": 1}),
    (FILLED.to, {"dtype": torch.float32}),
    (FILLED.load_state_dict, {"state_dict": FILLED.state_dict(), "specs": {0: LAYER.cache_spec}}),
    (distributed.clip_grad_norm_, {"module": MODEL, "max_norm": 1.0}),
    (distributed.full_state_dict, {"module": MODEL}),
    (generation.apply_temperature, {"logits": LOGITS, "temperature": 1.0}),
    (generation.apply_top_k, {"logits": LOGITS, "top_k": 2}),
    (generation.apply_top_p, {"logits": LOGITS, "top_p": 0.5}),
    (generation.apply_repetition_penalty, {"logits": LOGITS, "seen": LOGITS > 0, "penalty": 2.0}),
    (generation.sample, {"logits": LOGITS, "temperature": 1.0, "top_k": 2, "top_p": 0.5}),
    (generation.generate, {"model": MODEL, "prompt_ids": IDS, "max_new_tokens": 1}),
    (
        generation.stream,
        {
            "model": MODEL, "prompt_ids": IDS, "max_new_tokens": 1, "attention_mask": IDS + 1, "num_samples": 1,
            "temperature": 1.0, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.5, "stop": [[1]], "pad_token_id": 0,
            "seed": 1, "use_cache": True,
        },
    ),
    (inspect.record, {"model": LAYER}),
    (inspect.head_maps, {"call": CALL}),
    *(
        (function, {"maps": MAPS})
        for function in (
            inspect.active_share, inspect.active_share_by_distance, inspect.reach, inspect.negative_share,
            inspect.rank_use, inspect.mix_responses,
        )
    ),
    (integrations.register, {"adapter": Known()}),
    (integrations.resize_positions, {"model": BY_POSITION, "grid": (4, 4), "old_grid": (4, 4), "prefix_tokens": 0}),
    (integrations.restore_attention, {"model": MODEL}),
    (
        integrations.swap_attention,
        {
            "model": ENCODER, "mixer": "hyperglu", "layers": [0], "init": "fresh", "keep_originals": True,
            "adapter": None, "max_lag": 4, "backend": "auto",
        },
    ),
    (hypermlp.extend_max_lag, {"model": LAYER, "max_lag": 9, "fill": "identity"}),
    (hypermlp.parameter_groups, {"model": MODEL, "weight_decay": 0.1, "heads": []}),
    (hypermlp.build_layer, {"config": CONFIG, "backend": "auto", "layer_idx": 0}),
    (HyperGLU, {"hidden_size": 8, "backend": "auto", "layer_idx": 0}),
    (HyperConfig, {f.name: getattr(CONFIG, f.name) for f in CONFIG.__dataclass_fields__.values()}),
    (HyperConfig.from_label, {"label": "S", "hidden_size": 8}),
    (MixConfig, {"rank": 1, "diag": True, "identity": True}),
    (LanguageModelConfig, {f.name: getattr(MODEL.config, f.name) for f in MODEL.config.__dataclass_fields__.values()}),
    (LanguageModel, {"config": MODEL.config, "backend": "auto"}),
    (MODEL.forward, {"input_ids": IDS, "attention_mask": IDS + 1, "cu_seqlens": torch.tensor([0, 3]), "cache": None}),
    (LAYER.forward, {"hidden_states": X, "attention_mask": IDS + 1, "cu_seqlens": torch.tensor([0, 3]), "cache": None}),
    (LAYER.cache_part, {"cache": FILLED}),
    (next_token_loss, {"logits": torch.randn(1, 3, 9), "targets": IDS}),
    (attention_map, {"layer": LAYER, "hidden_states": X, "attention_mask": IDS + 1}),
    (
        hypermlp.hyper_attention,
        {
            **STREAMS, "routing_mix": None, "readout_mix": None, "selection": "glu", "norm": True, "eps": 1e-12,
            "causal": True, "layout": None, "max_lag": 4, "attention_mask": None, "cu_seqlens": None, "backend": "auto",
        },
    ),
    (short_conv, {"x": X, "taps": torch.randn(8, 4), "cu_seqlens": None, "past": X, "backend": "auto"}),
]  # fmt: skip
# their arguments are checked where the name is: a process group, an adapter's class, names of classes
ELSEWHERE = {"along_lags", "sequence_part", "sequence_whole", "shard_heads", "shard_sequence", "unregister"}
CASES = [pytest.param(call, right, name, id=f"{call.__qualname__}-{name}") for call, right in CALLS for name in right]


class Nothing:
    """Of no kind that anything takes."""


def functions() -> Iterator[Callable[..., Any]]:
    for name in MODULES:
        module = importlib.import_module(f"hypermlp.{name}".rstrip("."))
        yield from (f for f in map(module.__dict__.get, module.__all__) if python_inspect.isfunction(f))


def test_every_public_function_is_tried() -> None:
    tried = {call.__name__ for call, _ in CALLS}
    assert {f.__name__ for f in functions()} - tried == ELSEWHERE


@pytest.mark.parametrize(("call", "right", "name"), CASES)
def test_a_thing_of_another_kind_is_named(call: Callable[..., Any], right: dict[str, Any], name: str) -> None:
    for wrong in (Nothing(), (Nothing(), Nothing())):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**{**right, name: wrong})
        assert name in str(caught.value), caught.value
        assert "object is not" not in str(caught.value), caught.value


@pytest.mark.parametrize("wrong", [LAYER, "hyperglu", None, {"hidden_size": 8}])
def test_a_config_is_asked_for_where_a_layer_or_a_name_is_given(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"config must be a HyperConfig, got .*: HyperConfig\(.*\), or a layer's own"):
        budget.count_parameters(wrong)
    with pytest.raises(TypeError, match="other must be a HyperConfig"):
        budget.match_parameters(CONFIG, wrong, how="widen")


def test_a_call_without_hidden_states_says_so_under_record() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_states'"):
        inspect.record(LAYER)


def test_parts_of_a_batch_are_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"lengths, one a row, must be a tensor: crop\(torch.tensor\(\[3, 4\]\)\)"):
        FILLED.crop([3, 4])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["logits", "targets"])
def test_the_loss_takes_logits_and_numbers_of_tokens(name: str) -> None:
    right: dict[str, Tensor] = {"logits": torch.randn(1, 3, 9), "targets": IDS}
    with pytest.raises(TypeError, match="logits must be floating point and targets int64"):
        next_token_loss(**{**right, name: right[name].to(torch.int32)})


def test_integers_of_another_library_are_integers() -> None:
    two, layer = np.int64(2), HyperGLU(8, max_lag=4, layer_idx=np.int64(0))  # type: ignore[arg-type]
    assert type(layer.layer_idx) is int
    assert LayerCache(CacheSpec.of(CONFIG), two, two).max_length == 2  # type: ignore[arg-type]
    assert StaticLayerCache(CacheSpec.of(CONFIG), two).max_length == 2  # type: ignore[arg-type]
    assert HyperCache().layer(two, CacheSpec.of(CONFIG)).empty  # type: ignore[arg-type]
    assert budget.count_block_parameters(CONFIG, two) == budget.count_block_parameters(CONFIG, 2)  # type: ignore[arg-type]
    assert budget.count_block_flops(CONFIG, two, 1, 8) == budget.count_block_flops(CONFIG, 2, 1, 8)  # type: ignore[arg-type]
    many = np.int64(2**40)  # whose square is no int64
    assert budget.count_flops(CONFIG, many, many) == budget.count_flops(CONFIG, 2**40, 2**40)  # type: ignore[arg-type]
    assert budget.ring_bytes(two, two) == 1  # type: ignore[arg-type]
    assert budget.count_norm_kept(two, two) == budget.count_norm_kept(2, 2)  # type: ignore[arg-type]
    plain = generation.generate(MODEL, IDS, 2, num_samples=2, top_k=2, seed=2, pad_token_id=2)
    options: dict[str, Any] = dict.fromkeys(("num_samples", "top_k", "seed", "pad_token_id"), two)
    assert torch.equal(generation.generate(MODEL, IDS, two, **options), plain)  # type: ignore[arg-type]
    assert hypermlp.extend_max_lag(layer, np.int64(5)) == 1  # type: ignore[arg-type]
    assert type(layer.config.max_lag) is int
    swapped = integrations.swap_attention(copy.deepcopy(ENCODER), max_lag=4, layers=[*np.arange(1), -1])
    assert len(swapped.swapped) == 1
    for odd in (True, 1.0, np.array([0, 1]), torch.tensor(0.5), torch.tensor(1), torch.ones(2)):
        with pytest.raises(TypeError, match="layer_idx must be an integer >= 0, got"):
            HyperGLU(8, layer_idx=odd)  # type: ignore[arg-type]


def test_an_enumeration_s_numbers_are_numbers() -> None:
    class Place(int, enum.Enum):
        FIRST = 0

    layer, cache = HyperGLU(8, max_lag=4, layer_idx=Place.FIRST), HyperCache(max_crop=Place.FIRST)
    assert (type(layer.layer_idx), type(cache.max_crop)) == (int, int)


def test_truths_of_numpy_are_true() -> None:
    yes: Any = np.True_
    assert HyperCache(static=yes, max_length=4).layer(0, CacheSpec.of(CONFIG)).__class__ is StaticLayerCache
    assert generation.generate(MODEL, IDS, 1, use_cache=yes).shape == (1, 4)
    assert budget.count_norm_kept(8, 3, fused=yes) == budget.count_norm_kept(8, 3)
    assert integrations.swap_attention(copy.deepcopy(ENCODER), max_lag=4, keep_originals=yes)
    for odd in (1, 2, np.int64(1), torch.tensor(True), np.array([True])):
        with pytest.raises(TypeError, match="static must be True or False, got"):
            HyperCache(static=odd, max_length=4)  # type: ignore[arg-type]


def test_the_operator_s_switches_and_lags_too() -> None:
    given: dict[str, Any] = {**STREAMS, "selection": "glu"}
    assert torch.equal(
        hypermlp.hyper_attention(**given, norm=np.True_, causal=np.True_, max_lag=np.int64(4), eps=np.float32(0.5)),
        hypermlp.hyper_attention(**given, norm=True, max_lag=4, eps=0.5),
    )


def test_sequences_that_stop_a_text_may_lie_in_a_set_or_be_arrays() -> None:
    plain = generation.generate(MODEL, IDS, 6, seed=1)[0, 3:].tolist()
    expected = generation.generate(MODEL, IDS, 6, seed=1, stop=[plain[1:3]])
    assert expected.shape[1] < 9
    for stop in (
        {tuple(plain[1:3])},
        {tuple(plain[1:3]): 0}.keys(),
        [np.array(plain[1:3])],
        [torch.tensor(plain[1:3])],
    ):
        assert torch.equal(generation.generate(MODEL, IDS, 6, seed=1, stop=stop), expected)  # type: ignore[arg-type]


def test_targets_may_be_bytes() -> None:
    logits, targets = torch.randn(1, 3, 9), torch.tensor([[1, 8, 0]])
    assert torch.equal(next_token_loss(logits, targets.to(torch.uint8)), next_token_loss(logits, targets))


@pytest.mark.parametrize("largest", [np.float32(0.5), torch.tensor(0.5), 0.5])
def test_the_largest_norm_may_be_of_another_library(largest: Any) -> None:
    layer = HyperGLU(8, max_lag=4)
    layer(X + 1).sum().backward()
    distributed.clip_grad_norm_(layer, largest)
    norms = [parameter.grad.norm() for parameter in layer.parameters() if parameter.grad is not None]
    torch.testing.assert_close(torch.stack(norms).norm(), torch.tensor(0.5))


def test_tokens_before_a_grid_are_counted_in_any_integer() -> None:
    layer = HyperGLU(8, max_lag=17, causal=False)
    integrations.resize_positions(layer, (3, 3), old_grid=(4, 4), prefix_tokens=np.int64(1))  # type: ignore[arg-type]
    assert layer.config.max_lag == 10
    integrations.resize_positions(layer, np.int64(4), old_grid=np.int64(10))  # type: ignore[arg-type]
    assert layer.config.max_lag == 4
    assert type(layer.config.max_lag) is int
