"""Arguments of the Hugging Face family: the cache under every release's name, nothing swallowed, losses right."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.models.families import PAD, tiny, tiny_config, tokens

import transformers  # isort: skip
from transformers import DynamicCache, PreTrainedModel, Trainer, TrainingArguments  # isort: skip

from hypermlp.integrations.huggingface.names import CACHE_NAME
from hypermlp.models.huggingface import (
    HyperMLPConfig,
    HyperMLPForCausalLM,
    HyperMLPForSequenceClassification,
    HyperMLPModel,
    modeling,
)

NAMES = ["cache", "past_key_values"]


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_under_both_names(name):
    model, ids = tiny(), tokens(2, 9)
    classifier = HyperMLPForSequenceClassification(tiny_config(num_labels=3)).double().eval()
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        base = model.model(ids, use_cache=False).last_hidden_state
        for call, expected, field in (
            (model, whole.logits[:, 6:], "logits"),
            (model.model, base[:, 6:], "last_hidden_state"),
            (classifier, classifier(ids, use_cache=False).logits, "logits"),
        ):
            if call is classifier and name == "past_key_values" != CACHE_NAME:
                continue  # its forward is transformers' own, which calls this deprecated
            cache = DynamicCache(config=model.config)
            out = call(ids[:, :6], **{name: cache})
            assert getattr(out, CACHE_NAME) is cache
            found = getattr(call(ids[:, 6:], **{name: cache}), field)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        block, x = model.model.layers[0], torch.randn(2, 9, 16, dtype=torch.float64)
        cache = DynamicCache()
        parts = [block(part, **{name: cache}) for part in x.split([5, 4], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), block(x), rtol=0, atol=1e-10)
    caches = {name: DynamicCache(config=model.config) for name in NAMES}
    for call in (model, model.model):
        with pytest.raises(ValueError, match="pass one"):
            call(ids, **caches)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_call_the_cache_as_the_release_does(name, monkeypatch):
    monkeypatch.setattr(modeling, "CACHE_NAME", name)
    output = partial(SimpleNamespace, hidden_states=None)  # of any release: it takes every name
    monkeypatch.setattr(modeling, "BaseModelOutputWithPast", output)
    monkeypatch.setattr(modeling, "CausalLMOutputWithPast", SimpleNamespace)
    with torch.no_grad():
        assert getattr(tiny()(tokens(1, 5)), name).get_seq_length() == 5


def test_tools_are_told_of_both_names():
    assert set(NAMES) <= set(tiny()._skip_keys_device_placement)
    assert set(NAMES) <= set(HyperMLPConfig.keys_to_ignore_at_inference)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("token_type_ids", torch.zeros(2, 5, dtype=torch.long)),
        ("head_mask", torch.ones(2)),
        ("memory", DynamicCache()),
        ("output_router_logits", True),
        ("cahce", DynamicCache()),
    ],
)
def test_an_invented_argument_is_refused(name, value):
    model, ids = tiny(), tokens(2, 5)
    classifier = HyperMLPForSequenceClassification(tiny_config(num_labels=3)).eval()
    for call in (model, model.model, classifier):
        with pytest.raises(TypeError, match=rf"{name}=.*transformers {transformers.__version__}"):
            call(ids, **{name: value})
        call(ids, **{name: None})
    with pytest.raises(TypeError, match=name):
        model.model.layers[0](torch.randn(2, 5, 16).double(), **{name: value})


def test_it_is_causal():
    model, ids = tiny(), tokens(2, 5)
    model(ids, is_causal=True)
    with pytest.raises(ValueError, match="causal"):
        model(ids, is_causal=False)


def test_numbers_of_documents_are_their_bounds():
    model, ids = tiny(), tokens(2, 9)
    numbers = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 7])
    bounds = torch.tensor([0, 5, 9, 11, 18])
    expected = model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    torch.testing.assert_close(model(ids, seq_idx=numbers).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(ids[:1, :5]).logits[0], expected[0, :5], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds + 1)


def smoothed(logits, ids, factor):
    """Mean over the tokens that follow another one of (1 - f) times the loss and f times that of a uniform target."""
    chances = -F.log_softmax(logits[:, :-1].double(), dim=-1)
    loss = chances.gather(-1, ids[:, 1:, None]).mean()
    return (1 - factor) * loss + factor * chances.mean()


@pytest.mark.parametrize("kind", ["native", "swapped"])
def test_label_smoothing_is_of_the_next_token(kind, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    if kind == "native":
        model = tiny(pad_token_id=PAD)
    else:
        from tests.integrations.huggingface.hosts import swapped

        model = swapped("llama")
    ids = tokens(4, 9)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        expected = smoothed(model(ids).logits, ids, 0.1)
        found = trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids.clone()})
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("made", [HyperMLPForCausalLM, HyperMLPModel])
def test_saving_is_described_as_transformers_describes_it(made):
    """Tools look whether a model's method takes an option, and people read what it does."""
    ours, theirs = made.save_pretrained, PreTrainedModel.save_pretrained
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours is not theirs
    assert inspect.getdoc(ours) == inspect.getdoc(theirs)
