import pytest
import torch

from hypermlp.models import LanguageModel
from hypermlp_lab.training import Trainer, TrainingConfig, load_corpus
from hypermlp_lab.training.recipe import byte_model


@pytest.fixture
def new_trainer(text_folder):
    def build(out=None, mixer="hyperglu", **options):
        settings = {"steps": 6, "batch_size": 2, "seq_len": 16, "eval_windows": 4, "eval_every": 4, **options}
        config = TrainingConfig(**settings)
        torch.manual_seed(config.seed)
        model = LanguageModel(byte_model(mixer, hidden_size=16, num_layers=1, seq_len=16))
        return Trainer(model, load_corpus(text_folder), config, out=out)

    return build


@pytest.fixture
def saved(new_trainer, tmp_path):
    """A run with checkpoints of steps 1 and 2, and its weights after each."""
    out, weights = tmp_path / "run", []
    trainer = new_trainer(out)
    for _ in range(2):
        trainer.step()
        trainer.save()
        weights.append({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
    return out, weights
