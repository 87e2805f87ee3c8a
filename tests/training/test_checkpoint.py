"""Checkpoints: nothing that is there is lost, and what does not load is named."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.training import checkpoint
from hypermlp_lab.training.checkpoint import CheckpointError
from hypermlp_lab.training.files import FolderLock
from tests.training.runs import assert_kept, bytes_of, names, same, steps


def test_the_newest_two_are_kept(new_trainer, tmp_path):
    trainer = new_trainer(tmp_path)
    for count in range(1, 5):
        steps(trainer, 1)
        kept = [f"checkpoint-{step:08d}" for step in (count - 1, count) if step]
        assert names(tmp_path) == kept
        assert same(checkpoint.load_model(tmp_path), trainer.model.state_dict())


def test_a_compiled_model_is_written_as_it_was(tmp_path):
    model = LanguageModel(LanguageModelConfig(256, 16, 1, {"max_lag": 8}))
    checkpoint.save_checkpoint(str(tmp_path), 0, torch.compile(model, backend="eager"), {}, {})
    again = checkpoint.load_model(tmp_path)
    assert again.config == model.config
    assert same(again, model.state_dict())
    with pytest.raises(TypeError, match="model must be a LanguageModel, got Linear"):
        checkpoint.save_checkpoint(tmp_path / "other", 0, torch.nn.Linear(2, 2), {}, {})
    with pytest.raises(ValueError, match="step must be an integer >= 0, got -1"):
        checkpoint.save_checkpoint(tmp_path / "other", -1, model, {}, {})
    assert not (tmp_path / "other").exists()


class TestNotFinite:
    """A number that is not finite never replaces a good one."""

    def test_a_gradient_on_the_step_that_saves(self, new_trainer, tmp_path):
        trainer = new_trainer(tmp_path, checkpoint_every=2)
        last = trainer.model.blocks[0].attention.o_proj.weight

        def spoil(gradient):
            return gradient * torch.nan if trainer.progress.step == 3 else gradient

        last.register_hook(spoil)
        with pytest.raises(FloatingPointError, match=r"in step 4 the gradient's norm is nan.*smaller lr"):
            trainer.run()
        assert names(tmp_path) == ["checkpoint-00000002"]
        assert all(bool(weight.isfinite().all()) for weight in trainer.model.state_dict().values())
        again = new_trainer(tmp_path, checkpoint_every=2)
        assert again.resume()
        assert again.progress.step == 2

    def test_the_loss(self, new_trainer, tmp_path):
        trainer = new_trainer(tmp_path)
        steps(trainer, 1)
        with torch.no_grad():
            trainer.model.norm.weight.fill_(torch.inf)
        with pytest.raises(FloatingPointError, match=r"in step 2 the loss is nan"):
            trainer.step()
        with pytest.raises(FloatingPointError, match="after step 1 the validation loss is nan"):
            trainer.run()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("place", ["weight", "optimizer", "progress"])
    def test_anything_that_is_saved(self, new_trainer, saved, place, value):
        out, _ = saved
        before = bytes_of(out)
        trainer = new_trainer(out)
        assert trainer.resume()
        trainer.step()
        if place == "weight":
            trainer.model.blocks[0].attention.routing_mix.diag.data.view(-1)[0] = value
        elif place == "optimizer":
            next(iter(trainer.optimizer.state.values()))["exp_avg_sq"].view(-1)[-1] = value
        else:
            trainer.progress.loss_sum = value
        with pytest.raises(FloatingPointError, match=r"after step 3 .*(routing_mix.diag|exp_avg_sq|loss_sum) is not"):
            trainer.save()
        assert_kept(out, before)
        assert names(out) == ["checkpoint-00000001", "checkpoint-00000002"]


class TestOtherRuns:
    """What another run wrote stays, unless asked."""

    def test_a_trainer_that_has_not_resumed(self, new_trainer, saved):
        out, _ = saved
        before = bytes_of(out)
        trainer = new_trainer(out, seed=1)
        with pytest.raises(ValueError, match=r"checkpoint-00000002 exists: resume\(\)"):
            trainer.run()
        assert trainer.progress.step == 0
        trainer.step()
        with pytest.raises(ValueError, match="delete_checkpoints"):
            trainer.save()
        assert_kept(out, before)
        checkpoint.delete_checkpoints(out)
        trainer.save()
        assert names(out) == ["checkpoint-00000001"]

    def test_a_run_that_another_has_overtaken(self, new_trainer, saved):
        out, _ = saved
        first, second = new_trainer(out), new_trainer(out)
        assert first.resume()
        assert second.resume()
        assert first.run()
        before = bytes_of(out)
        with pytest.raises(ValueError, match="checkpoint-00000006 exists"):
            second.run()
        assert_kept(out, before)

    def test_a_failed_resume_changes_nothing(self, new_trainer, saved):
        out, _ = saved
        trainer = new_trainer(out)
        start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        file = out / "checkpoint-00000002" / "trainer.pt"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError):
            trainer.resume()
        assert same(trainer.model, start)
        assert not trainer.optimizer.state
        assert trainer.progress.step == 0


HOLD = """
import sys, time
from pathlib import Path
from hypermlp_lab.training.files import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class TestLock:
    def test_one_writer_and_its_name(self, new_trainer, tmp_path):
        import socket

        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout.readline() == "held\n"
            trainer = new_trainer(tmp_path)
            trainer.step()
            for write in (trainer.save, trainer.run):
                with pytest.raises(OSError, match=f"process {holder.pid} on {socket.gethostname()}: let that end"):
                    write()
            assert names(tmp_path) == []
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            holder.stdout.close()
        # it died without letting go: its lock is taken over
        trainer.save()
        assert names(tmp_path) == ["checkpoint-00000001"]

    def test_its_holder_enters_again_and_another_object_does_not(self, tmp_path):
        lock, other = FolderLock(tmp_path), FolderLock(tmp_path)
        with lock:
            with lock:
                pass
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
                other.__enter__()
        with other:
            pass

    def test_writers_at_once_lose_nothing(self, new_trainer, tmp_path):
        """Three start the same run at once: one trains it, the others say why they do not."""
        trainers, errors = [new_trainer(tmp_path, steps=20, checkpoint_every=1) for _ in range(3)], []
        begin = threading.Barrier(3)

        def run(trainer):
            begin.wait()
            try:
                trainer.run()
            except (OSError, ValueError) as error:
                errors.append(str(error))

        threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(trainer.finished for trainer in trainers) == [False, False, True]
        assert len(errors) == 2
        for error in errors:
            assert "is being written by process" in error or "exists: resume()" in error
        assert names(tmp_path) == ["checkpoint-00000019", "checkpoint-00000020"]
        checkpoint.load_model(tmp_path)
