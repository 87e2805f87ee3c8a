"""Checkpoints on a disk: files that do not load, writes that fail."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from hypermlp.models import LanguageModel
from hypermlp_lab.training import checkpoint
from hypermlp_lab.training.checkpoint import CheckpointError
from hypermlp_lab.training.files import replace_file
from tests.training.runs import assert_kept, bytes_of, names, same, steps


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def garble(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def scramble(file):
    file.write_bytes(bytes(range(256)) * 8)


class TestDoesNotLoad:
    def test_a_folder_of_transformers_is_told_how_it_opens(self, tmp_path):
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "config.json").write_text('{"model_type": "hypermlp"}')
        with pytest.raises(CheckpointError, match=r"is a model of transformers .*: it opens by AutoModelForCausalLM"):
            checkpoint.load_model(tmp_path)

    @pytest.mark.parametrize("damage", [truncate, empty, garble, scramble, Path.unlink])
    @pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt", "config.json"])
    def test_it_is_named_and_the_one_before_is_offered(self, new_trainer, saved, file, damage):
        out, weights = saved
        newest = out / "checkpoint-00000002"
        damage(newest / file)
        if damage is garble and file == "config.json":
            (newest / file).write_bytes((newest / file).read_bytes().replace(b"{", b"[", 1))
        message = f"{newest / file} does not load: .*The one before is {out / 'checkpoint-00000001'}: move"
        if file != "trainer.pt":
            with pytest.raises(CheckpointError, match=message):
                checkpoint.load_model(out)
        trainer = new_trainer(out)
        with pytest.raises(CheckpointError, match=message) as caught:
            trainer.resume()
        assert "\n" not in str(caught.value)
        # as the message says
        shutil.move(newest, out / "broken")
        assert trainer.resume()
        assert trainer.progress.step == 1
        assert same(trainer.model, weights[0])

    def test_there_is_none_before(self, saved):
        out, _ = saved
        shutil.rmtree(out / "checkpoint-00000002")
        empty(out / "checkpoint-00000001" / "model.safetensors")
        with pytest.raises(CheckpointError, match="no checkpoint before it"):
            checkpoint.load_model(out / "checkpoint-00000001")

    def test_a_single_changed_bit_of_a_weight(self, saved):
        out, _ = saved
        file = out / "checkpoint-00000002" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="checksum"):
            checkpoint.load_model(out)

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"num_layers": 100_000}, "100,000"),
            ({"num_layers": 10**9}, "1,000,000,000"),
            ({"intermediate_size": 10**9}, "describes"),
            ({"vocab_size": 10**12}, "describes"),
            ({"hidden_size": 10**9, "attention": {"hidden_size": 10**9}}, "describes"),
            ({"attention": {"max_lag": 10**15}}, "describes"),
            ({"attention": {"mix_rank": 10**15}}, "describes"),
        ],
    )
    def test_sizes_are_checked_before_anything_is_built(self, saved, changes, found, monkeypatch):
        out, _ = saved
        file = out / "checkpoint-00000002" / "config.json"
        config = json.loads(file.read_text())
        attention = changes.pop("attention", {})
        config["model"] |= changes
        if attention:
            for name in ("qk_dim", "v_dim", "routing_mix", "readout_mix"):
                config["model"]["attention"].pop(name)
        config["model"]["attention"] |= attention
        file.write_text(json.dumps(config))
        monkeypatch.setattr(LanguageModel, "__init__", None)  # nothing may be built
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"model.safetensors does not load: .*{found}"):
            checkpoint.load_model(out)
        assert time.monotonic() - start < 5

    def test_shapes_of_the_same_number(self, saved):
        from safetensors.torch import load_file, save_file

        out, _ = saved
        file = out / "checkpoint-00000002" / "model.safetensors"
        weights = load_file(file)
        weights["embedding.weight"] = weights["embedding.weight"].T.contiguous()
        save_file(weights, file)
        with pytest.raises(CheckpointError, match=r"embedding.weight is \(16, 256\) and config.json .*\(256, 16\)"):
            checkpoint.load_model(out)

    def test_there_is_nothing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpoint.load_model(tmp_path)

    def test_a_checkpoint_of_before_there_were_checksums(self, saved):
        out, weights = saved
        file = out / "checkpoint-00000002" / "config.json"
        config = json.loads(file.read_text())
        del config["sha256"]
        file.write_text(json.dumps(config))
        assert same(checkpoint.load_model(out), weights[1])


class TestWriting:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    @pytest.mark.parametrize("at", range(5))
    def test_a_write_that_fails_leaves_what_was(self, new_trainer, saved, monkeypatch, number, at):
        """At the first sync, the second, ..., a failing disk."""
        out, weights = saved
        before = bytes_of(out)
        trainer = new_trainer(out)
        assert trainer.resume()
        trainer.step()
        calls, real = [], os.fsync

        def fail(handle):
            calls.append(handle)
            if len(calls) == at + 1:
                raise OSError(number, os.strerror(number))
            real(handle)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            trainer.save()
        monkeypatch.undo()
        assert "\n" not in str(caught.value)
        assert str(out) in str(caught.value)
        if number != errno.EIO:
            assert "free space" in str(caught.value)
        assert_kept(out, before)
        assert names(out) == ["checkpoint-00000001", "checkpoint-00000002"]
        assert same(checkpoint.load_model(out), weights[1])
        trainer.save()
        assert names(out) == ["checkpoint-00000002", "checkpoint-00000003"]

    def test_a_limit_that_the_system_sets(self, new_trainer, saved):
        """Not simulated: files may not grow beyond a size."""
        resource = pytest.importorskip("resource")
        out, _ = saved
        trainer = new_trainer(out)
        assert trainer.resume()
        trainer.step()
        handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"model.safetensors cannot be written: File too large"):
                trainer.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert names(out) == ["checkpoint-00000001", "checkpoint-00000002"]

    def test_everything_is_on_the_disk_before_an_older_one_goes(self, new_trainer, saved, monkeypatch):
        out, _ = saved
        trainer = new_trainer(out)
        assert trainer.resume()
        trainer.step()
        events, sync, remove, rename = [], os.fsync, shutil.rmtree, os.replace

        def record(kind, real, path_of):
            def recorded(*args, **kwargs):
                events.append((kind, path_of(args[0])))
                return real(*args, **kwargs)

            return recorded

        handle_path = Path("/proc/self/fd")
        if not handle_path.exists():
            pytest.skip("needs /proc to know what a handle is of")
        monkeypatch.setattr(os, "fsync", record("sync", sync, lambda fd: os.readlink(handle_path / str(fd))))
        monkeypatch.setattr(shutil, "rmtree", record("remove", remove, str))
        monkeypatch.setattr(os, "replace", record("rename", rename, str))
        trainer.save()
        new, run = str(out / ".checkpoint-00000003.tmp"), str(out)
        renamed = events.index(("rename", new))
        files = [f"{new}/{file}" for file in ("model.safetensors", "trainer.pt", "config.json")]
        assert all(events.index(("sync", path)) < renamed for path in (*files, new))
        gone = events.index(("rename", str(out / "checkpoint-00000001")))
        assert renamed < events.index(("sync", run), renamed) < gone

    @pytest.mark.parametrize("times", [1, 2])
    def test_ctrl_c_in_the_middle_of_a_save(self, new_trainer, tmp_path, monkeypatch, times):
        """Once: the save is finished, and the run stops. Twice: the save is dropped, and the last one stays."""
        trainer = new_trainer(tmp_path, checkpoint_every=2)
        real = torch.save

        def interrupted(*args):
            if trainer.progress.step == 4:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            real(*args)

        monkeypatch.setattr(torch, "save", interrupted)
        if times == 1:
            assert not trainer.run()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
        monkeypatch.undo()
        last = 4 if times == 1 else 2
        assert names(tmp_path)[-1] == f"checkpoint-{last:08d}"
        assert not list(tmp_path.glob("*.tmp"))
        again, whole = new_trainer(tmp_path, checkpoint_every=2), new_trainer()
        assert again.resume()
        assert again.progress.step == last
        assert again.run()
        assert whole.run()
        assert same(again.model, whole.model.state_dict())

    def test_killed_in_the_middle_of_a_save(self, new_trainer, saved):
        out, weights = saved
        leftover = out / ".checkpoint-00000003.tmp"
        shutil.copytree(out / "checkpoint-00000002", leftover)
        assert same(checkpoint.load_model(out), weights[1])
        trainer = new_trainer(out)
        assert trainer.resume()
        steps(trainer, 2)
        assert names(out) == ["checkpoint-00000002", "checkpoint-00000004"]

    def test_the_folder_is_a_file(self, new_trainer, tmp_path):
        (tmp_path / "file").write_text("notes")
        for out in (tmp_path / "file", tmp_path / "file" / "run"):
            trainer = new_trainer(out)
            with pytest.raises(OSError, match=rf"{out} cannot be made a folder: (File exists|Not a directory)"):
                trainer.run()
            assert trainer.progress.step == 0
        assert (tmp_path / "file").read_text() == "notes"

    def test_a_file_is_replaced_whole_or_not(self, tmp_path, monkeypatch):
        file = tmp_path / "report.json"
        replace_file(file, b"old")
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match=r"report.json.*No space left; free space"):
            replace_file(file, b"new")
        assert file.read_bytes() == b"old"
        assert names(tmp_path) == ["report.json"]
