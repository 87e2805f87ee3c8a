"""The models that the commands train, and how two of them get equal parameter counts."""

from __future__ import annotations

from dataclasses import replace

from hypermlp.budget import count_block_parameters, match_intermediate_size
from hypermlp.checks import did_you_mean
from hypermlp.config import HyperConfig
from hypermlp.models import LanguageModelConfig

BYTE_VOCAB = 256
# each mixer as the paper's study has it at its best: baselines with rotation and convolution
_LABELS = {"hyperglu": "G-cg-q-12o", "hypermlp": "R-cg-q-12o", "relu": "R-pc", "softmax": "S-pc"}
# two for hyper mixers, as in the paper; softmax learns better with four than with two at width 128
_HYPER_HEADS, _BASELINE_HEADS = 2, 4


def byte_model(
    mixer: str, *, hidden_size: int, num_layers: int, seq_len: int, max_lag: int | None = None
) -> LanguageModelConfig:
    """A language model over bytes.

    Args:
        mixer: ``"hyperglu"``, ``"hypermlp"``, ``"relu"``, ``"softmax"`` or a label of the paper's
            study, see :meth:`hypermlp.HyperConfig.from_label`.
        hidden_size, num_layers: of the model.
        seq_len: tokens it is trained on at a time.
        max_lag: lags a layer reaches back over. None: ``seq_len`` with sequence mixing, else no
            limit.
    """
    label = _LABELS.get(mixer) or _label(mixer)
    attention = HyperConfig.from_label(label, hidden_size, max_lag=max_lag)
    hyper = attention.mixer in ("hyperglu", "hypermlp")
    attention = replace(
        attention,
        num_heads=_HYPER_HEADS if hyper else _BASELINE_HEADS,
        max_lag=seq_len if hyper and max_lag is None else max_lag,
    )
    return LanguageModelConfig(BYTE_VOCAB, hidden_size, num_layers, attention, context_length=seq_len)


def _label(name: str) -> str:
    """``name`` as a label of the study; ValueError, the nearest mixer first, where it is not meant as one."""
    near = nearest_mixer(name)
    if not near and ("-" in name or name in ("S", "R", "G")):
        return name
    raise ValueError(
        f"mixer {name!r} is unknown: {near}known are {', '.join(_LABELS)}, and labels of the paper's study such as "
        "R-cg-q"
    )


def nearest_mixer(name: str) -> str:
    """A question after the mixer that ``name`` looks like, for messages; empty where it looks like none."""
    near = did_you_mean(name.lower(), _LABELS)
    return f"{near} " if near else ""


def parameter_count(config: LanguageModelConfig) -> int:
    """Parameters of the model, which is not built."""
    inner = config.intermediate_size
    if config.max_lags is None:  # any number of layers, such as nobody can build
        blocks = config.num_layers * count_block_parameters(config.attention, inner)
    else:
        layers = map(config.attention_config, range(config.num_layers))
        blocks = sum(count_block_parameters(layer, inner) for layer in layers)
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return blocks + embeddings + config.hidden_size


def match_parameters(*configs: LanguageModelConfig) -> list[LanguageModelConfig]:
    """Widen the MLPs of all but the largest model until the parameter counts are equal.

    Raises:
        ValueError: the nearest width is more than 1 % off, which only tiny models are.
    """
    largest = max(configs, key=parameter_count)
    return [config if config is largest else _widened(config, largest) for config in configs]


def _widened(config: LanguageModelConfig, largest: LanguageModelConfig) -> LanguageModelConfig:
    width = match_intermediate_size(largest.attention, config.attention, largest.intermediate_size).intermediate_size
    assert width is not None
    return replace(config, intermediate_size=width)
