"""Arguments of a swapped attention: the cache under every release's name, packed documents, nothing swallowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from hypermlp.integrations.huggingface.names import CACHE_NAME, CACHE_NAMES
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import BUILD, cache_of, logits, swapped, tokens

BOUNDS = torch.tensor([0, 5, 9])


def hosts_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hosts call the cache ``name``, as those of another release do."""
    forward = HuggingFaceAttention.forward

    def renamed(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        for known in CACHE_NAMES:
            if known in kwargs:
                kwargs[name] = kwargs.pop(known)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HuggingFaceAttention, "forward", renamed)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("host", ["llama", "gpt2", "gpt_neox"])
def test_the_cache_under_every_name(host: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_say(name, monkeypatch)
    model = swapped(host)
    checks.check_stepwise(model)
    checks.check_generate(model, "greedy")


def test_a_cache_under_a_name_to_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_say("memory", monkeypatch)
    with pytest.raises(TypeError, match=rf"memory=.*transformers {transformers.__version__}"):
        checks.check_stepwise(swapped("llama"))


def test_two_caches_are_refused() -> None:
    model: Any = swapped("llama")
    caches = {"cache": cache_of(model), "past_key_values": cache_of(model)}
    with torch.no_grad(), pytest.raises(ValueError, match=f"pass one, as {CACHE_NAME}="):
        checks.attentions(model)[0](torch.randn(1, 4, 32, dtype=torch.float64), **caches)


@pytest.mark.parametrize("name", BUILD)
def test_an_invented_argument_is_refused(name: str) -> None:
    """Which hosts hand on to their attention, whatever it may mean."""
    layer = checks.attentions(swapped(name))[0]
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"temperature=0\.5"):
        layer(x, temperature=0.5)
    with pytest.raises(TypeError, match="head_mask=a Tensor"):
        layer(x, head_mask=torch.ones(4))
    assert layer(x, head_mask=None)[0].shape == x.shape


def test_encoder_states_are_refused() -> None:
    layer = checks.attentions(swapped("bert_decoder"))[0]
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        layer(x, encoder_hidden_states=x)


def test_the_wrong_causality_is_refused() -> None:
    for name, causal in (("llama", True), ("bert", False)):
        layer = checks.attentions(swapped(name))[0]
        x = torch.randn(1, 4, 32, dtype=torch.float64)
        assert layer(x, is_causal=causal)[0].shape == x.shape
        with pytest.raises(ValueError, match=f"is_causal={not causal}"):
            layer(x, is_causal=not causal)


DOCUMENTS: dict[str, dict[str, Any]] = {
    "bounds": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 5, "max_length_k": 5},
    "numbers": {"seq_idx": torch.tensor([[0] * 5 + [1] * 4])},
}


@pytest.mark.parametrize("how", DOCUMENTS)
def test_documents_that_a_collator_names(how: str) -> None:
    """With and without the positions that say the same."""
    model = swapped("llama")
    ids = tokens(1, 9)
    alone = torch.cat([logits(model, part, use_cache=False) for part in ids.split([5, 4], dim=1)], dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(4)))[None]
    for more in ({"position_ids": positions}, {}):
        out = logits(model, ids, use_cache=False, **DOCUMENTS[how], **more)
        assert checks.error(out, alone) < checks.TOLERANCE


def test_documents_that_do_not_agree_are_refused() -> None:
    model = swapped("llama")
    ids = tokens(1, 9)
    positions = torch.cat((torch.arange(3), torch.arange(6)))[None]
    with pytest.raises(ValueError, match="other documents than attention_mask"):
        logits(model, ids, use_cache=False, cu_seq_lens_q=BOUNDS, position_ids=positions)
    with pytest.raises(ValueError, match="cu_seq_lens_k must be cu_seq_lens_q"):
        logits(model, ids, use_cache=False, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="seq_idx must be"):
        logits(model, ids, use_cache=False, seq_idx=torch.zeros(2, 9))
    cache = transformers.DynamicCache()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        checks.attentions(model)[0](x, **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="cannot continue a cache"):
            checks.attentions(model)[0](x, cu_seq_lens_q=BOUNDS, **{CACHE_NAME: cache})
