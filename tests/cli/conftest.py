import pytest
from typer import testing as typer_testing

from hypermlp.models import LanguageModel
from hypermlp_lab import cli
from hypermlp_lab.training import Trainer, TrainingConfig, load_corpus
from hypermlp_lab.training.recipe import byte_model

TINY = ["--hidden-size", "16", "--layers", "1", "--seq-len", "32", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture
def command():
    app = cli.build_app()

    def run(*arguments):
        result = typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("def function(x):\n    return x\n" * 100)
    model = LanguageModel(byte_model("hyperglu", hidden_size=16, num_layers=1, seq_len=16))
    config = TrainingConfig(1, batch_size=2, seq_len=16)
    Trainer(model, load_corpus(folder / "text.txt"), config, out=folder / "run").run()
    return folder / "run"
