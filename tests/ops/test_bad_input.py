"""Bad input is a ValueError or TypeError that names the argument, at the door and nowhere later."""

from __future__ import annotations

import pytest
import torch

from hypermlp.ops import SequenceMix, hyper_attention
from tests.helpers import BACKENDS, make_case

B, T, H, K, V, R, L = 2, 6, 2, 3, 4, 2, 8


def rand(*shape: int, **kwargs):
    return torch.randn(*shape, **kwargs)


def mix(heads: int = 2 * H, **changes) -> SequenceMix:
    tables = {"diag": rand(heads, L), "down": rand(heads, L, R), "up": rand(heads, L, R), "core": rand(B, T, heads, R)}
    return SequenceMix(**(tables | changes))


def call(**changes):
    inputs = {"q": rand(B, T, 2 * H, K), "k": rand(B, T, 2 * H, K), "v": rand(B, T, H, V)} | changes
    return hyper_attention(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), **inputs)


STREAMS = {
    "q is None": ({"q": None}, TypeError, "q must be a tensor"),
    "k is a list": ({"k": [1.0]}, TypeError, "k must be a tensor"),
    "v is None": ({"v": None}, TypeError, "v must be a tensor"),
    "q of rank 3": ({"q": rand(B, T, K)}, ValueError, r"q must be \[batch, length, heads, width\]"),
    "v of rank 5": ({"v": rand(B, T, H, V, 1)}, ValueError, "v must be"),
    "q integer": ({"q": torch.ones(B, T, 2 * H, K, dtype=torch.long)}, TypeError, "q must be float16.*int64"),
    "q complex": ({"q": rand(B, T, 2 * H, K, dtype=torch.complex64)}, TypeError, "q must be float16.*complex64"),
    "k of another dtype": ({"k": rand(B, T, 2 * H, K, dtype=torch.float64)}, TypeError, "k is torch.float64.*autocast"),
    "v of another dtype": ({"v": rand(B, T, H, V).half()}, TypeError, "v is torch.float16"),
    "v on another device": ({"v": rand(B, T, H, V, device="meta")}, ValueError, "v is on meta and q on cpu"),
    "k of another width": ({"k": rand(B, T, 2 * H, K + 1)}, ValueError, "k must have the shape of q"),
    "k of another batch": ({"k": rand(B + 1, T, 2 * H, K)}, ValueError, "k must have the shape of q"),
    "k of another length": ({"k": rand(B, T + 1, 2 * H, K)}, ValueError, "v must share batch and length with k"),
    "k of fewer tokens than q": (
        {"k": rand(B, T - 1, 2 * H, K), "v": rand(B, T - 1, H, V)},
        ValueError,
        "q has 6 tokens and k 5",
    ),
    "v of another length": ({"v": rand(B, T + 1, H, V)}, ValueError, "v must share batch and length"),
    "v of another batch": ({"v": rand(B + 1, T, H, V)}, ValueError, "v must share batch and length"),
    "v without width": ({"v": rand(B, T, H, 0)}, ValueError, "v has no heads or no width"),
    "heads that do not divide": ({"v": rand(B, T, 3, V)}, ValueError, "q has 4 score maps and v 3 heads"),
    "relu with two maps": ({"selection": "relu"}, ValueError, "takes 1 maps a head"),
}

OPTIONS = {
    "selection": ({"selection": "gelu"}, ValueError, "selection must be one of .*'gelu'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of .*'cuda'"),
    "layout": ({"layout": "time"}, ValueError, "layout must be one of .*'time'"),
    "layout lag both ways": ({"layout": "lag", "causal": False}, ValueError, "layout='lag' needs causal=True"),
    "eps zero": ({"eps": 0.0}, ValueError, "eps must be positive and finite, .* got 0.0"),
    "eps infinite": ({"eps": float("inf")}, ValueError, "eps must be positive and finite, .* got inf"),
    "eps zero in float32": ({"eps": 1e-46}, ValueError, "eps must be positive and finite, from 1.18e-38 .* got 1e-46"),
    "eps beyond float32": ({"eps": 1e39}, ValueError, "eps must be positive and finite, from .* got 1e.39"),
    "eps a string": ({"eps": "x"}, TypeError, "eps must be a number, got 'x'"),
    "eps a bool": ({"eps": True}, TypeError, "eps must be a number, got True"),
    "eps negative": ({"eps": -1e-6}, ValueError, "eps must be positive"),
    "eps nan": ({"eps": float("nan")}, ValueError, "eps must be positive"),
    "max_lag zero": ({"max_lag": 0}, ValueError, "max_lag must be a positive integer.*0"),
    "max_lag float": ({"max_lag": 4.0}, TypeError, "max_lag must be a positive integer"),
    "max_lag bool": ({"max_lag": True}, TypeError, "max_lag must be a positive integer"),
    "max_lag unlike tables": (
        {"routing_mix": mix(), "max_lag": 5},
        ValueError,
        r"agree on the number of lags.*\[5, 8\]",
    ),
    "too long by position": ({"layout": "position", "max_lag": 5}, ValueError, "6 tokens does not fit.*5 rows"),
}

MIXES = {
    "not a mix": ({"routing_mix": (None,) * 5}, TypeError, "routing_mix must be a SequenceMix"),
    "not a mix, second": ({"readout_mix": 3}, TypeError, "readout_mix must be a SequenceMix"),
    "table is a list": ({"routing_mix": mix(diag=[1.0])}, TypeError, "routing_mix.diag must be a tensor"),
    "down alone": ({"routing_mix": SequenceMix(down=rand(4, L, R))}, ValueError, "routing_mix.down and routing_mix.up"),
    "empty map": ({"readout_mix": SequenceMix(identity=False)}, ValueError, "readout_mix has no identity"),
    "core alone": ({"routing_mix": SequenceMix(core=rand(B, T, 4, R))}, ValueError, "routing_mix.core multiplies"),
    "diag of rank 3": ({"routing_mix": mix(diag=rand(4, L, 1))}, ValueError, "routing_mix.diag must have 2 dim"),
    "down of rank 2": ({"routing_mix": mix(down=rand(4, L))}, ValueError, "routing_mix.down must have 3 dim"),
    "up of another rank": (
        {"routing_mix": mix(up=rand(4, L, R + 1))},
        ValueError,
        "routing_mix.up must have the shape",
    ),
    "integer table": (
        {"routing_mix": mix(diag=torch.ones(4, L, dtype=torch.int32))},
        TypeError,
        "diag must be a float",
    ),
    "table on meta": ({"routing_mix": mix(diag=rand(4, L, device="meta"))}, ValueError, "routing_mix.diag is on meta"),
    "heads": ({"readout_mix": mix(2 * H)}, ValueError, "readout_mix.diag must serve 2 heads"),
    "no rows": ({"routing_mix": SequenceMix(diag=rand(4, 0))}, ValueError, "routing_mix.diag has an empty dimension"),
    "rows disagree": ({"routing_mix": mix(diag=rand(4, L + 1))}, ValueError, r"number of lags, got \[8, 9\]"),
    "core too short": ({"routing_mix": mix(core=rand(B, T - 1, 4, R))}, ValueError, "routing_mix.core must be"),
    "core of another rank": ({"routing_mix": mix(core=rand(B, T, 4, R + 1))}, ValueError, "routing_mix.core must be"),
    "core of another dtype": ({"routing_mix": mix(core=rand(B, T, 4, R).double())}, TypeError, "routing_mix.core is"),
    "narrow tables": ({"routing_mix": mix(diag=rand(4, L).half())}, TypeError, "routing_mix's tables must share"),
}

MASKS = {
    "a list": ({"attention_mask": [[1] * T] * B}, TypeError, "attention_mask must be a tensor"),
    "additive": ({"attention_mask": torch.zeros(B, T)}, TypeError, "attention_mask must be bool or integer.*additive"),
    "of rank 4": (
        {"attention_mask": torch.ones(B, 1, T, T).bool()},
        ValueError,
        r"attention_mask must be \[batch, len",
    ),
    "too long": ({"attention_mask": torch.ones(B, T + 1).bool()}, ValueError, "attention_mask must be"),
    "transposed": ({"attention_mask": torch.ones(T, B).bool()}, ValueError, "attention_mask must be"),
    "on meta": ({"attention_mask": torch.ones(B, T, device="meta").bool()}, ValueError, "attention_mask is on meta"),
    "of documents": ({"attention_mask": torch.full((B, T), 2)}, ValueError, "attention_mask must hold 0 and 1.*cu_seq"),
    "negative": ({"attention_mask": torch.full((B, T), -1)}, ValueError, "attention_mask must hold 0 and 1"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), [
    pytest.param(*row, id=f"{name}: {what}")
    for name, table in (("streams", STREAMS), ("options", OPTIONS), ("mixes", MIXES), ("mask", MASKS))
    for what, row in table.items()
])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_bad_input_is_named(changes, kind, message, autocast):
    casts_away = {"k of another dtype", "v of another dtype", "core of another dtype"}
    if autocast and any(changes is row[0] for table in (STREAMS, MIXES) for n, row in table.items() if n in casts_away):
        pytest.skip("autocast makes the dtypes one")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(kind, match=message):
        call(**changes)


def bounds(*values: int, **kwargs):
    return torch.tensor(values, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cu_seqlens", "kind", "message"),
    [
        ([0, 6], TypeError, r"cu_seqlens must be a tensor, got list: give torch\.tensor\(.*int32"),
        (bounds(0.0, 6.0), TypeError, "cu_seqlens must be int32 or int64"),
        (bounds(0, 6, dtype=torch.int16), TypeError, "cu_seqlens must be int32 or int64"),
        (bounds(-1, 6), ValueError, "cu_seqlens must lie within 0 and 6 tokens, got -1 to 6"),
        (bounds(0, 7), ValueError, "cu_seqlens must lie within 0 and 6 tokens, got 0 to 7"),
        (bounds(0, 4, 2, 6), ValueError, r"cu_seqlens must not decrease, got \[0, 4, 2, 6\]"),
        (bounds(0, 9, 6), ValueError, r"cu_seqlens must not decrease, got \[0, 9, 6\]"),
        (bounds(0), ValueError, r"cu_seqlens must be \[N \+ 1\]"),
        (bounds(0, 6)[None], ValueError, r"cu_seqlens must be \[N \+ 1\]"),
        (bounds(0, 6).to("meta"), ValueError, "cu_seqlens is on meta"),
    ],
    ids=str,
)
def test_bad_bounds_are_named(backend, cu_seqlens, kind, message):
    with pytest.raises(kind, match=message):
        make_case(length=6).run(backend, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_need_one_row(backend):
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1, got 2"):
        make_case(batch=2, length=6).run(backend, cu_seqlens=bounds(0, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_fit_position_tables_one_by_one(backend):
    case = make_case(length=6, layout="position", max_lag=4)
    assert case.run(backend, cu_seqlens=bounds(0, 4, 6)).isfinite().all()
    with pytest.raises(ValueError, match="5 tokens does not fit position-indexed tables of 4 rows"):
        case.run(backend, cu_seqlens=bounds(0, 5, 6))


def test_good_input_is_taken():
    call(routing_mix=mix(), readout_mix=mix(H), max_lag=L, attention_mask=torch.ones(B, T).bool())
