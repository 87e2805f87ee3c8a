"""Training a small language model on text."""

from hypermlp.training.config import TrainingConfig
from hypermlp.training.data import Corpus, load_corpus, standard_library
from hypermlp.training.trainer import Trainer

__all__ = ["Corpus", "Trainer", "TrainingConfig", "load_corpus", "standard_library"]
