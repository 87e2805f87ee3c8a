"""Models built from the layers."""

from hypermlp.models.context import extend_max_lag
from hypermlp.models.language_model import LanguageModel, LanguageModelConfig, next_token_loss

__all__ = ["LanguageModel", "LanguageModelConfig", "extend_max_lag", "next_token_loss"]
