"""What some hosts of transformers do besides: a report says it, or it is refused, or it stays the host's."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hypermlp import swap_attention
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.families import inputs, stock, tokens
from tests.integrations.huggingface.proofs import outputs, swapped


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


NOTES = {
    "qwen3": ["normalises queries and keys"],
    "bloom": ["biases by distance (ALiBi)"],
    "mpnet": ["biases by relative position", "the table of those biases stays in the model, with no gradient"],
    "albert": [
        "1 x AlbertAttention: the model has 1 of it and calls them 3 times, and so the hyper layers in their place",
    ],
}


@pytest.mark.parametrize("name", NOTES)
def test_a_report_says_what_a_host_did_besides(name: str) -> None:
    model = stock(name)
    report = str(swap_attention(model))
    for note in NOTES[name]:
        assert note in report
    model.train()(**inputs(name)).logits.sum().backward()
    unused = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == ({"mpnet.encoder.relative_attention_bias.weight"} if name == "mpnet" else set())


@pytest.mark.parametrize(("layers", "groups", "inner"), [(2, 4, 2), (3, 5, 1), (4, 2, 1)])
def test_albert_says_which_of_its_attention_is_never_called(layers: int, groups: int, inner: int) -> None:
    """With more groups than layers its encoder passes over some, and so over what is put there."""
    model: Any = stock("albert", num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner)
    report = swap_attention(model)
    assert len(report.swapped) == groups * inner
    called: list[nn.Module] = []
    for entry in report.swapped:
        entry.layer.register_forward_hook(lambda module, *_: called.append(module))
    outputs(model, inputs("albert"))
    used = len(set(called))
    assert len(called) == layers * inner
    assert (f"has {groups * inner} of it and calls {used} of these" in str(report)) == (used < groups * inner)


def test_a_text_model_that_says_both_is_refused() -> None:
    """CLIP's is bidirectional with eager attention, and causal with ``sdpa``."""
    for name, said in (("clip_text", False), ("clip_vision", True), ("siglip_vision", True), ("siglip_text", True)):
        with pytest.raises(ValueError, match=rf"is_causal={said}, which this model obeys with some"):
            swap_attention(stock(name, is_causal=said))


@pytest.mark.parametrize("swap", [False, True], ids=["stock", "swapped"])
def test_falcon_with_alibi_has_no_static_cache(swap: bool) -> None:
    """Its model adds biases of the tokens so far to a mask of the whole cache, whatever its attention is.

    transformers 5.5 ends sooner, at a mask that is no longer one of tokens.
    """
    model = swapped("falcon_alibi") if swap else stock("falcon_alibi")
    with pytest.raises((RuntimeError, ValueError), match=r"must match the size of tensor|too many values to unpack"):
        checks.generate(model, tokens(2, 7), cache_implementation="static")
