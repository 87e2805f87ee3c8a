"""Training a small language model on text."""

from hypermlp_lab.training.config import TrainingConfig
from hypermlp_lab.training.data import Corpus, load_corpus, standard_library
from hypermlp_lab.training.trainer import Trainer

__all__ = ["Corpus", "Trainer", "TrainingConfig", "load_corpus", "standard_library"]
