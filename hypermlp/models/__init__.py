"""Models built from the layers."""

from hypermlp.models.language_model import LanguageModel, LanguageModelConfig, next_token_loss

__all__ = ["LanguageModel", "LanguageModelConfig", "next_token_loss"]
