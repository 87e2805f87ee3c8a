"""Tools that know nothing of this library run its models: an evaluation harness, TRL, other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from hypermlp import swap_attention
from tests.models.families import tiny

import transformers  # isort: skip

pytestmark = pytest.mark.slow  # each imports for seconds

LETTERS = [chr(code) for code in range(32, 127)]
QUESTIONS = [
    ("two and two is", [" four", " five"], 0),
    ("the cat sat on the", [" car", " mat"], 1),
    ("one", [" two", " nine hundred"], 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny(dtype=torch.float32, vocab_size=len(tokenizer), eos_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log_likelihood(model, tokenizer, question, answer):
    ids = torch.tensor([tokenizer(question + answer)["input_ids"]])
    with torch.no_grad():
        scores = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return scores[0, -len(answer) :].sum().item()


def test_evaluation_harness(checkpoint, tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="make test-tools has lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, model = checkpoint
    rows = [{"q": q, "a": choices[label], "choices": choices, "label": label} for q, choices, label in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    tasks = {
        "choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: label\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n',
        "write": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs: {until: ["~"], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n',
        "bits": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}{{a}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
    }
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: tiny_{name}\n{common}{text}")
    report = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", batch_size=2),
        tasks=[f"tiny_{name}" for name in tasks],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    for sample in report["samples"]["tiny_choice"]:
        found = [score for score, _ in sample["filtered_resps"]]
        expected = [log_likelihood(model, tokenizer, sample["doc"]["q"], c) for c in sample["doc"]["choices"]]
        assert found == pytest.approx(expected, abs=1e-3)
    assert report["results"]["tiny_bits"]["bits_per_byte,none"] > 0
    for sample in report["samples"]["tiny_write"]:
        prompt = torch.tensor([tokenizer(sample["doc"]["q"])["input_ids"]])
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == expected.split("~")[0]


@pytest.mark.parametrize("causal", [True, False])
def test_the_harness_pads_on_the_right_without_a_mask(tokenizer, causal):
    """A causal layer does not see what comes after a text; a bidirectional one reads it, as the stock model does."""
    pytest.importorskip("lm_eval", reason="make test-tools has lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), is_causal=causal, **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    swap_attention(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    asked = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=len(requests))
    found = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    expected = [log_likelihood(model, tokenizer, *pair) for pair in asked]
    assert (found == pytest.approx(expected, abs=1e-3)) == causal


# trl's own use of what transformers deprecates
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [True, False])
def test_supervised_tuning_with_trl(checkpoint, tokenizer, packing, tmp_path):
    trl = pytest.importorskip("trl", reason="make test-tools has trl")
    import datasets

    folder, _ = checkpoint
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=32,
            packing=packing,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": [q + c[label] for q, c, label in QUESTIONS] * 8}),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert float(losses[-1]) < float(losses[0])
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


FRESH = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
assert not [name for name in sys.modules if name.startswith("hypermlp")]
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__module__ == "hypermlp.models.huggingface.modeling", type(model)
    print(type(model).__name__)
"""


def test_a_checkpoint_opens_where_the_family_was_not_imported(checkpoint, tmp_path):
    out = run("-c", FRESH, str(checkpoint[0]), HF_HOME=str(tmp_path))
    assert out.split() == ["HyperMLPModel", "HyperMLPForCausalLM", "HyperMLPForSequenceClassification"]


SPLIT = """
import sys
import torch
import torch.distributed as dist
import hypermlp.models.huggingface
from hypermlp.distributed import shard_heads
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

config = DistributedConfig(tp_size=2, tp_plan="auto")
split = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=config)
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1])
half, full = (model.model.layers[0].mlp.up_proj.weight for model in (split, whole))
assert half.to_local().shape[0] * 2 == full.shape[0]
ids = torch.arange(3, 23).view(2, 10)
outs = [model(ids, labels=ids) for model in (split, whole)]
torch.testing.assert_close(outs[0].logits, outs[1].logits, rtol=1e-4, atol=1e-5)
for out in outs:
    out.loss.backward()
for (name, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
    grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    torch.testing.assert_close(grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
texts = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (split, whole)]
assert torch.equal(*texts)
shard_heads(split)
torch.testing.assert_close(split(ids).logits, outs[1].logits, rtol=1e-4, atol=1e-5)
assert torch.equal(split.generate(ids, max_new_tokens=6, do_sample=False), texts[1])
assert split.model.layers[0].attention.config.num_heads * 2 == whole.model.layers[0].attention.config.num_heads
print("same", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_share_the_weights(checkpoint, tmp_path):
    pytest.importorskip(
        "transformers", minversion="5.23", reason="written for this way of asking for tensor parallelism"
    )
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(checkpoint[0]))
    assert run(*command).count("same") == 2
