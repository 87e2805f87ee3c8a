"""Training swapped transformers models: gradients, checkpointing, compile, autocast, LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import swap_attention
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from hypermlp.integrations.huggingface.names import CACHE_NAME
from tests.hf_names import set_checkpointing
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import BUILD, FOUR, logits, stock, swapped, tokens

# what PEFT itself still uses of transformers
of_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert checks.error(grad, expected[name]) <= tolerance * max(1.0, float(expected[name].abs().max())), name


@pytest.mark.parametrize(
    ("name", "init"),
    # qwen3 normalises its queries and keys, which its projections alone do not say
    [
        (name, init)
        for name in BUILD
        for init in ("fresh", "from_attention")
        if (name, init) != ("qwen3", "from_attention")
    ],
)
def test_every_parameter_gets_a_gradient(name: str, init: str) -> None:
    grads = checks.check_gradients(swapped(name, init=init))
    ours = [grad for key, grad in grads.items() if ".mixer." in key]
    assert len(ours) >= 2 * 13
    if init == "fresh":
        assert all(grad.any() for grad in ours)


def test_a_parameter_cut_off_is_noticed() -> None:
    model = swapped("llama")
    layer = checks.attentions(model)[0].mixer
    conv = layer.k_conv
    conv.forward = lambda *args, **kwargs: type(conv).forward(conv, *args, **kwargs).detach()
    with pytest.raises(AssertionError, match="no gradient"):
        checks.check_gradients(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [*FOUR, "bert"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model: Any = swapped(name)
    expected = checks.check_gradients(model)
    set_checkpointing(model, use_reentrant=reentrant)
    calls: list[int] = []
    checks.attentions(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(checks.check_gradients(model), expected)
    assert len(calls) == 2, "the layer was not computed again"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n != "llama" else n for n in FOUR])
def test_compiled(name: str) -> None:
    model: Any = swapped(name, num_hidden_layers=1)
    ids = tokens(2, 9)

    def grads(call: Any) -> dict[str, Tensor]:
        model.zero_grad()
        call(ids, use_cache=False).logits.square().mean().backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    expected = grads(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(grads(compiled), expected)
    padded, mask, _ = checks.padded("left")
    with torch.no_grad():
        out, alone = (m(padded, attention_mask=mask, use_cache=False).logits for m in (compiled, model))
    assert checks.error(out[mask == 1], alone[mask == 1]) < checks.TOLERANCE
    torch._dynamo.reset()


def test_packing_in_a_compiled_model_is_refused() -> None:
    model: Any = swapped("llama", num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = torch.cat((torch.arange(5), torch.arange(4)))[None]
    with torch.no_grad(), pytest.raises(RuntimeError, match="packed sequences"):
        compiled(tokens(1, 9), position_ids=positions, use_cache=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_autocast(name: str) -> None:
    """Gradients in float32, and no further from those without autocast than twice what the plain equations are."""

    def relative_error(model: nn.Module) -> float:
        expected = checks.check_gradients(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = checks.check_gradients(model)
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        away = sum((grads[key] - grad).square().sum() for key, grad in expected.items())
        return float(away / sum(grad.square().sum() for grad in expected.values())) ** 0.5

    assert relative_error(swapped(name).float()) <= 2 * relative_error(swapped(name, backend="reference").float())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_model(name: str) -> None:
    model: Any = stock(name).to(torch.bfloat16)
    swap_attention(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model, tokens(2, 7)).dtype == torch.bfloat16
    out = checks.generate(model, tokens(2, 7))
    assert out.shape == (2, 17)


def test_a_cache_made_while_training_says_that_it_is_empty() -> None:
    """Models make one by default; gradients do not go through it."""
    model: Any = swapped("llama")
    ids = tokens(2, 7)
    out = model(ids)
    assert checks.error(out.logits.detach(), logits(model, ids)) < checks.TOLERANCE
    with pytest.raises(RuntimeError, match="no_grad"):
        logits(model, ids[:, :1], **{CACHE_NAME: getattr(out, CACHE_NAME)})


def test_a_cache_takes_no_gradients_later_either() -> None:
    model: Any = swapped("llama")
    ids = tokens(2, 7)
    with torch.no_grad():
        cache = getattr(model(ids), CACHE_NAME)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(ids[:, :1], **{CACHE_NAME: cache})


@of_peft
def test_lora_trains_and_merges() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = swapped("llama")
    before = logits(model, tokens(2, 7))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=True)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all("mixer." in name and "lora" in name for name in trained)
    assert checks.error(logits(adapted, tokens(2, 7)), before) < checks.TOLERANCE
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    ids = tokens(2, 9)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    after = logits(adapted, tokens(2, 7))
    assert checks.error(after, before) > 1e-3
    merged = adapted.merge_and_unload()
    assert checks.error(logits(merged, tokens(2, 7)), after) < checks.TOLERANCE
    checks.check_generate(merged, "greedy")


@of_peft
def test_adapters_on_the_host_are_not_lost() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = stock("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = tokens(2, 7)
    before = logits(adapted, ids)
    with pytest.raises(ValueError, match=r"self_attn .*merge_and_unload"):
        swap_attention(adapted)
    assert torch.equal(logits(adapted, ids), before)
    swap_attention(adapted.merge_and_unload())


@of_peft
def test_whole_layers_can_be_trained_with_lora_elsewhere(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = swapped("llama")
    fresh = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["self_attn"])
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = tokens(2, 9)
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert checks.error(logits(again, ids), logits(adapted, ids)) < checks.TOLERANCE
    assert checks.error(logits(again, ids), logits(swapped("llama"), ids)) > 1e-3


def test_dropout_of_the_host_is_kept() -> None:
    model: Any = stock("gpt2", resid_pdrop=0.5)
    swap_attention(model)
    layer = checks.attentions(model)[0].train()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    out, _ = layer(x)
    whole, _ = layer.eval()(x)
    dropped = (out == 0) & (whole != 0)
    assert 0.3 < float(dropped.float().mean()) < 0.7
    assert checks.error(out, torch.where(dropped, 0, 2 * whole)) < checks.TOLERANCE


def test_dropping_the_dropout_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *args, **kwargs: x)
    with pytest.raises(AssertionError):
        test_dropout_of_the_host_is_kept()


def test_attention_is_the_host_class_too() -> None:
    """Hooks of transformers find the modules that they record by their class."""
    model: Any = swapped("llama")
    layer = model.model.layers[0].self_attn
    assert type(stock("llama").model.layers[0].self_attn) in type(layer).__mro__
    assert isinstance(layer, HuggingFaceAttention)
