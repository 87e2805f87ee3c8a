"""The language model as a Hugging Face family.

Importing this package makes the family known to ``AutoConfig``, ``AutoModel``,
``AutoModelForCausalLM`` and ``AutoModelForSequenceClassification``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
# Trainer's label smoothing looks here, and not among the registered, whether labels are of the next token
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HyperMLPConfig.model_type] = HyperMLPForCausalLM.__name__
