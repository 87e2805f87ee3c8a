"""The models that the commands train, and how two of them get equal parameter counts."""

from __future__ import annotations

from dataclasses import replace

from hypermlp.config import HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig

BYTE_VOCAB = 256
# each mixer as the paper's study has it at its best: baselines with rotation and convolution
_LABELS = {"hyperglu": "G-cg-q-12o", "hypermlp": "R-cg-q-12o", "relu": "R-pc", "softmax": "S-pc"}
# largest relative difference between models that are called equal
_TOLERANCE = 0.01


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
    label = _LABELS.get(mixer, mixer)
    attention = HyperConfig.from_label(label, hidden_size, max_lag=max_lag)
    if max_lag is None and attention.max_lag is not None:
        attention = replace(attention, max_lag=seq_len)
    return LanguageModelConfig(BYTE_VOCAB, hidden_size, num_layers, attention, context_length=seq_len)


def parameter_count(config: LanguageModelConfig) -> int:
    """Parameters of the model, which is not built in memory."""
    return LanguageModel(config, device="meta").num_parameters()


def match_parameters(*configs: LanguageModelConfig) -> list[LanguageModelConfig]:
    """Widen the MLPs of all but the largest model until the parameter counts are equal.

    Raises:
        ValueError: the nearest width is more than 1 % off, which only tiny models are.
    """
    target = max(parameter_count(config) for config in configs)
    return [_widened(config, target) for config in configs]


def _widened(config: LanguageModelConfig, target: int) -> LanguageModelConfig:
    per_channel = 3 * config.hidden_size * config.num_layers
    missing = target - parameter_count(config)
    result = replace(config, intermediate_size=config.intermediate_size + round(missing / per_channel))
    count = parameter_count(result)
    if abs(count - target) > _TOLERANCE * target:
        raise ValueError(
            f"no intermediate_size brings {config.attention.mixer} within 1 % of {target} parameters "
            f"(nearest: {count}): use a larger model"
        )
    return result
