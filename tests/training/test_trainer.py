import json
import math
import os
import signal
from itertools import pairwise

import pytest
import torch

from hypermlp import HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.training import TrainingConfig, checkpoint
from hypermlp_lab.training.optimizer import build_optimizer, learning_rate


class Interrupting:
    """Presses Ctrl-C during some step."""

    def __init__(self, at, times=1):
        self.at, self.times = at, times

    def on_step(self, step, loss, tokens_per_second):
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)

    def on_evaluation(self, point): ...


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("mixer", ["hyperglu", "softmax"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_run_equals_an_uninterrupted_one(new_trainer, tmp_path, mixer, stop):
    whole = new_trainer(mixer=mixer)
    assert whole.run()

    first = new_trainer(tmp_path / "run", mixer)
    first.watcher = Interrupting(stop)
    assert not first.run()
    assert first.progress.step == stop
    second = new_trainer(tmp_path / "run", mixer, seed=0)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.fill_(7.0)  # whatever the new process began with does not count
    assert second.resume()
    assert second.run()

    assert same_weights(whole.model, second.model)
    assert whole.progress.history == second.progress.history
    assert [point["step"] for point in whole.progress.history] == [0, 4, 6]


def test_runs_are_reproducible_and_the_seed_matters(new_trainer):
    first, again, other = new_trainer(), new_trainer(), new_trainer(seed=1)
    for trainer in (first, again, other):
        trainer.run()
    assert first.progress.history == again.progress.history
    assert first.progress.history != other.progress.history


def test_training_learns(new_trainer):
    trainer = new_trainer(steps=60, lr=1e-2, eval_every=30)
    trainer.run()
    bits = [point["bits_per_byte"] for point in trainer.progress.history]
    assert bits[0] > 7
    assert bits[-1] < 5
    point = trainer.progress.history[-1]
    assert point["bits_per_byte"] == pytest.approx(point["validation_loss"] / math.log(2))


def test_interrupt_restores_the_handler_and_a_second_one_stops_at_once(new_trainer, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = new_trainer(tmp_path)
    trainer.watcher = Interrupting(2, times=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_refuses_another_run(new_trainer, tmp_path, text_folder):
    trainer = new_trainer(tmp_path / "run")
    trainer.step()
    trainer.save()
    with pytest.raises(ValueError, match=r"lr: resume with lr=0\.008"):
        new_trainer(tmp_path / "run", lr=1e-3).resume()
    with pytest.raises(ValueError, match="attention"):
        new_trainer(tmp_path / "run", "softmax").resume()
    (text_folder / "file0.txt").write_text("something else")
    with pytest.raises(ValueError, match="text has changed"):
        new_trainer(tmp_path / "run").resume()
    assert not new_trainer(tmp_path / "empty").resume()


def test_a_loss_that_is_not_finite_stops_the_run(new_trainer, tmp_path):
    trainer = new_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.embedding.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="smaller lr"):
        trainer.run()
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_autocast(new_trainer):
    trainer = new_trainer(dtype="bfloat16")
    trainer.run()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert math.isfinite(trainer.progress.history[-1]["validation_loss"])


def test_decay_is_on_linear_matrices_alone():
    config = LanguageModelConfig(11, 16, 1, HyperConfig(16, max_lag=8, bias=True))
    model = LanguageModel(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, TrainingConfig(10)).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    inside = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    outside = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert inside | outside == set(names.values())
    assert {name.rpartition(".")[0].rpartition("_")[2].rpartition(".")[2] for name in inside} == {"proj"}
    attention = "blocks.0.attention."
    for name in ("q_proj.bias", "k_conv.weight", "routing_mix.up", "readout_mix.diag"):
        assert attention + name in outside
    assert "embedding.weight" in outside
    assert attention + "gate.proj.weight" in inside


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainingConfig(100, lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(0, TrainingConfig(3, lr=1.0)) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 5, "lr": 0.0},
        {"steps": 5, "lr": math.nan},
        {"steps": 5, "lr": math.inf},
        {"steps": 5, "weight_decay": math.inf},
        {"steps": 5, "grad_clip": -1.0},
        {"steps": 2**63},
        {"steps": 5, "seed": 2**64},
        {"steps": 5, "dtype": "float16"},
        {"steps": 5, "weight_decay": -1.0},
        {"steps": 5, "warmup_steps": -1},
    ],
)
def test_bad_configs(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        TrainingConfig(**options)


@pytest.mark.parametrize("options", [{"batch_size": True}, {"lr": "1e-3"}, {"lr": True}, {"weight_decay": None}])
def test_configs_of_another_type(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        TrainingConfig(5, **options)


def test_a_checkpoint_that_lacks_a_setting_is_of_another_version(new_trainer, saved):
    out, _ = saved
    for file in out.glob("checkpoint-*/config.json"):
        values = json.loads(file.read_text())
        del values["training"]["table_lr"]
        file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="different in table_lr: it was written by another version, train anew"):
        new_trainer(out).resume()
