"""A model of about as many parameters as are asked for."""

from __future__ import annotations

from typing import Any, get_args

from hypermlp.config import HyperConfig, Mixer
from hypermlp.models import LanguageModelConfig
from hypermlp_lab.training.recipe import nearest_mixer, parameter_count

# 32 layers at width 4096, as models of 7e9 parameters have
_WIDTH_OF_A_LAYER = 128
_STEP, _SOFTMAX_HEAD = 256, 128
_TOLERANCE = 0.2


def sized_model(
    params: float | None,
    *,
    mixer: str = "hyperglu",
    seq_len: int,
    vocab_size: int = 32000,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    max_lag: int | None = None,
) -> LanguageModelConfig:
    """The description of a :class:`~hypermlp.models.LanguageModel`; nothing is built.

    Args:
        params: parameters, tables and embedding included; None where width and layers are given.
        mixer: of every layer; softmax attention and ReLU attention with rotation, and heads of 128.
        seq_len: tokens of a sequence.
        vocab_size: tokens there are.
        hidden_size, num_layers: None for 128 of width a layer, and as many as ``params`` asks for.
        num_heads: None for the mixer's default.
        max_lag: lags of the tables of a hyper mixer, ``seq_len`` by default.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    if mixer not in get_args(Mixer):
        known = ", ".join(get_args(Mixer))
        raise ValueError(f"--mixer {mixer!r} is unknown: {nearest_mixer(mixer)}known are {known}")
    hyper = mixer in ("hyperglu", "hypermlp")
    if max_lag is not None and not hyper:
        raise ValueError(f"--max-lag {max_lag} is for hyperglu and hypermlp: {mixer} is planned without a window")
    if (params is None) == (hidden_size is None or num_layers is None):
        raise ValueError("give --params, or --hidden-size and --layers both and no --params")
    shape: dict[str, Any] = {"mixer": mixer, "vocab_size": vocab_size, "max_lag": max_lag}
    if hyper:
        shape["max_lag"] = seq_len if max_lag is None else max_lag
    if params is None:
        assert hidden_size is not None
        assert num_layers is not None
        return _model(hidden_size, num_layers, num_heads, **shape)
    if not 0 < params < 1e15:
        raise ValueError(f"--params must be a number of parameters such as 7e9, got {params:g}")
    if num_layers is not None:
        model = _widest(params, num_layers, num_heads, shape)
    else:
        model = _deepest(params, _width(params) if hidden_size is None else hidden_size, num_heads, shape)
    found = parameter_count(model)
    if abs(found / params - 1) > _TOLERANCE:
        raise ValueError(
            f"--params {params:g} has no model near it: hidden size {model.hidden_size} and {model.num_layers} layers "
            f"make {found:,}, with tables of {shape['max_lag'] or 0:,} lags and {vocab_size:,} tokens: give another "
            "--hidden-size, --layers, --max-lag or --vocab-size"
        )
    return model


def _width(params: float) -> int:
    """A block has about 12 times its width squared: widths of ``params = 12 width^3 / 128``."""
    exact = (params * _WIDTH_OF_A_LAYER / 12) ** (1 / 3)
    return int(_STEP * max(1, round(exact / _STEP)))


def _deepest(params: float, hidden_size: int, heads: int | None, shape: dict[str, Any]) -> LanguageModelConfig:
    one, two = (_model(hidden_size, layers, heads, **shape) for layers in (1, 2))
    block = parameter_count(two) - parameter_count(one)
    return _model(hidden_size, max(1, 1 + round((params - parameter_count(one)) / block)), heads, **shape)


def _widest(params: float, num_layers: int, heads: int | None, shape: dict[str, Any]) -> LanguageModelConfig:
    """The width, in steps, whose count is nearest."""
    best = _model(_STEP, num_layers, heads, **shape)
    while parameter_count(best) < params:
        wider = _model(best.hidden_size + _STEP, num_layers, heads, **shape)
        if parameter_count(wider) - params > params - parameter_count(best):
            break
        best = wider
    return best


def _model(
    hidden_size: int, num_layers: int, num_heads: int | None, *, mixer: Mixer, vocab_size: int, max_lag: int | None
) -> LanguageModelConfig:
    plain = mixer in ("relu", "softmax")
    if num_heads is None:
        num_heads = max(1, hidden_size // _SOFTMAX_HEAD) if plain else 2
    attention = HyperConfig(hidden_size, num_heads, mixer, max_lag=max_lag, rope=plain)
    return LanguageModelConfig(vocab_size, hidden_size, num_layers, attention)
