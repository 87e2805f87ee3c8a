"""The language model as a Hugging Face family.

Importing this package makes the family known to ``AutoConfig``, ``AutoModel``,
``AutoModelForCausalLM`` and ``AutoModelForSequenceClassification``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hypermlp.models.huggingface.configuration import HyperMLPConfig
from hypermlp.models.huggingface.modeling import (
    HyperMLPForCausalLM,
    HyperMLPForSequenceClassification,
    HyperMLPModel,
    HyperMLPPreTrainedModel,
)

__all__ = [
    "HyperMLPConfig",
    "HyperMLPForCausalLM",
    "HyperMLPForSequenceClassification",
    "HyperMLPModel",
    "HyperMLPPreTrainedModel",
]

AutoConfig.register(HyperMLPConfig.model_type, HyperMLPConfig)
AutoModel.register(HyperMLPConfig, HyperMLPModel)
AutoModelForCausalLM.register(HyperMLPConfig, HyperMLPForCausalLM)
AutoModelForSequenceClassification.register(HyperMLPConfig, HyperMLPForSequenceClassification)
