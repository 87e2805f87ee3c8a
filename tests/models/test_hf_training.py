"""Training the Hugging Face family: gradients, checkpointing, compilation, Trainer, adapters."""

from __future__ import annotations

import logging

import pytest
import torch

from hypermlp import parameter_groups
from hypermlp.integrations.huggingface.names import CACHE_NAME
from tests.hf_names import set_checkpointing
from tests.models.families import ATTENTION, PAD, assert_same_weights, left_padded, tiny, tokens

from transformers import DynamicCache, Trainer, TrainingArguments  # isort: skip
from transformers.generation import CompileConfig  # isort: skip

MIXERS = list(ATTENTION)
CLOSE = {"rtol": 0, "atol": 1e-10}


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(mixer, reentrant):
    model, (ids, mask) = tiny(mixer).train(), left_padded([5, 9])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = gradients(model, **inputs)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    assert all(g.isfinite().all() and g.any() for g in expected.values())
    set_checkpointing(model, use_reentrant=reentrant)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, **inputs)
    assert len(calls) == 2, "nothing was recomputed"
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, **CLOSE, msg=name)
    set_checkpointing(model, on=False)
    calls.clear()
    gradients(model, **inputs)
    assert len(calls) == 1


def test_checkpointing_and_a_cache_do_not_meet(caplog):
    model, ids = tiny().train(), tokens(2, 5)
    assert getattr(model(ids), CACHE_NAME) is None  # no cache while gradients are on, unless asked for
    set_checkpointing(model)
    with caplog.at_level(logging.WARNING):
        assert getattr(model(ids, use_cache=True), CACHE_NAME) is None
    with torch.no_grad():
        assert isinstance(getattr(model.eval()(ids), CACHE_NAME), DynamicCache)
        assert getattr(model(ids, use_cache=False), CACHE_NAME) is None
        model.config.use_cache = False
        assert getattr(model(ids), CACHE_NAME) is None


@pytest.mark.parametrize("packed", [True, False])
def test_trainer(packed, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from transformers import DataCollatorWithFlattening

    model = tiny(dtype=torch.float32, pad_token_id=PAD).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    texts = [tokens(1, length, seed)[0].tolist() for seed, length in enumerate([6, 9, 6, 3] * 4)]
    rows = [
        {"input_ids": text[:3] if not packed else text, "labels": text[:3] if not packed else text} for text in texts
    ]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=3e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=4,
            save_strategy="no",
            seed=0,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True) if packed else None,
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * first
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    trainer.save_model(str(tmp_path / "m"))
    again = type(model).from_pretrained(tmp_path / "m")
    assert_same_weights(again, model)
    ids = tokens(1, 5)
    torch.testing.assert_close(again.double()(ids).logits, model.eval().double()(ids).logits, **CLOSE)


def test_trainer_decays_the_matrices_alone(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = tiny(dtype=torch.float32).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # a step so small that the decay is all of it: a tenth of each weight
    groups = parameter_groups(model, weight_decay=1e6)
    settings = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), lr_scheduler_type="constant", **settings),
        train_dataset=[{"input_ids": tokens(1, 5)[0].tolist(), "labels": tokens(1, 5)[0].tolist()}] * 2,
        optimizers=(torch.optim.AdamW(groups, lr=1e-7), None),
    ).train()
    assert groups.tables["params"]
    kept = {id(p) for p in (*groups.tables["params"], *groups.others["params"])}
    for name, p in model.named_parameters():
        expected = before[name] * (1.0 if id(p) in kept else 0.9)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_low_rank_adapters_merge():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model, ids = tiny(), tokens(2, 7)
    plain = model(ids).logits
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    out = adapted(input_ids=ids, labels=ids)
    out.loss.backward()
    assert not torch.allclose(out.logits, plain)
    assert all((p.grad is not None) == ("lora" in name) for name, p in adapted.named_parameters())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, out.logits, **CLOSE)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(merged.generate(ids, **options), merged.generate(ids, use_cache=False, **options))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_prompt_tuning_stands_before_the_embeddings():
    """PEFT writes a mask of floats 0 and 1."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model, (ids, mask) = tiny(), left_padded([5, 7])
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    out = tuned(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert all(p.grad.any() for p in tuned.parameters() if p.requires_grad)
    virtual = tuned.get_prompt(batch_size=2)
    embeds = torch.cat((virtual, model.get_input_embeddings()(ids)), 1)
    longer = torch.cat((torch.ones(2, 3, dtype=torch.long), mask), 1)
    expected = model(inputs_embeds=embeds, attention_mask=longer).logits
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    # PEFT 0.21 does not know the name that transformers 5.24 has for the cache, and prompts every token anew
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "use_cache": False}
    with torch.no_grad():
        made = tuned.generate(input_ids=ids, **options)
        for _ in range(5):
            logits = model(inputs_embeds=embeds, attention_mask=longer).logits[:, -1]
            ids = torch.cat((ids, logits.argmax(-1)[:, None]), 1)
            embeds = torch.cat((virtual, model.get_input_embeddings()(ids)), 1)
            longer = torch.cat((longer, longer.new_ones(2, 1)), 1)
    assert torch.equal(made, ids)


def test_masks_of_floats_are_zeros_and_ones():
    model, (ids, mask) = tiny(), left_padded([5, 9])
    torch.testing.assert_close(model(ids, attention_mask=mask.double()).logits, model(ids, attention_mask=mask).logits)
    additive = torch.zeros_like(ids, dtype=torch.float64)
    for wrong in (additive, additive.masked_fill(mask == 0, float("-inf")), mask * 0.5):
        with pytest.raises(ValueError, match="of floats only 0 for padding and 1 for tokens"):
            model(ids, attention_mask=wrong)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_prefix_tuning_is_refused_with_what_to_take():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    tuned = peft.get_peft_model(tiny(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    with pytest.raises(ValueError, match=r"something else than a hyper layer .*prefix tuning.*take prompt tuning"):
        tuned(input_ids=tokens(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["hyperglu", "softmax"])
def test_compiled_training_step(mixer):
    model, ids = tiny(mixer).train(), tokens(2, 8)
    expected = gradients(model, input_ids=ids, labels=ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(input_ids=ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], **CLOSE, msg=name)


@pytest.mark.slow
def test_a_compiled_static_step_generates_the_same():
    model, (ids, mask) = tiny(), left_padded([4, 7])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, use_cache=False, **options)
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(found, expected)


def test_labels_may_be_hidden():
    model, ids = tiny(), tokens(2, 6)
    labels = ids.clone()
    labels[:, :4] = -100
    logits = model(ids).logits[:, 3:5]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 4:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=1e-6, atol=1e-6)
