"""What the tests of checkpoints share."""

import torch


def names(out):
    return sorted(entry.name for entry in out.iterdir() if entry.name not in (".lock", ".owner", "text"))


def steps(trainer, count):
    for _ in range(count):
        trainer.step()
    trainer.save()


def bytes_of(out):
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def assert_kept(out, before):
    after = bytes_of(out)
    assert all(after.get(name) == content for name, content in before.items() if not name.startswith("."))


def same(model, weights):
    return all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
