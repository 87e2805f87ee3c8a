"""Parts swapped on their own, and models inside of others: recorded, saved and opened, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations.huggingface import from_pretrained, record_swaps
from hypermlp.integrations.sites import swaps_in
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.families import inputs, stock, tokens
from tests.integrations.huggingface.proofs import outputs

PARTS = {
    "t5": lambda model: model.encoder,
    "bart": lambda model: model.model.decoder,
    "whisper": lambda model: model.model.encoder,
    "llama": lambda model: model.model,
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_recorded_saved_and_opened(name: str, tmp_path: Path) -> None:
    model: Any = stock(name)
    report = swap_attention(PARTS[name](model), max_lag=20)
    model.save_pretrained(tmp_path / "silent")
    with pytest.raises(ValueError, match=r"record_swaps\(model\)"):
        from_pretrained(tmp_path / "silent")
    record_swaps(model)
    model.save_pretrained(tmp_path / "told")
    again = from_pretrained(tmp_path / "told").eval()
    checks.check_same_weights(again, model)
    assert swaps_in(again) == swaps_in(model)
    assert len(swaps_in(again)[0]["layers"]) == len(report.swapped) == 2
    expected = outputs(model, inputs(name))
    assert checks.error(outputs(again, inputs(name)), expected) < 1e-5 * max(1.0, float(expected.abs().max()))
    restore_attention(PARTS[name](model))
    model.save_pretrained(tmp_path / "restored")
    with pytest.raises(ValueError, match="is no swapped model"):
        from_pretrained(tmp_path / "restored")


def test_a_second_swap_of_a_part_is_in_the_record(tmp_path: Path) -> None:
    """The whole was swapped before: it looks what stands when it is saved."""
    model: Any = stock("bart")
    swap_attention(model, layers=[0])
    swap_attention(model.model.decoder)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    checks.check_same_weights(again, model)
    assert swaps_in(again) == swaps_in(model)


def test_a_model_in_data_parallel_is_recorded_itself(tmp_path: Path) -> None:
    model: Any = stock("llama")
    holder = nn.DataParallel(model)
    report = swap_attention(holder)
    assert [entry.name for entry in report.swapped] == [f"module.model.layers.{n}.self_attn" for n in range(2)]
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    ids = tokens(2, 7)
    with torch.no_grad():
        assert checks.error(again(ids).logits, holder(ids).logits) < 1e-6
    restore_attention(holder)
    assert not swaps_in(model)


def test_nothing_to_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing in this LlamaForCausalLM has been swapped"):
        record_swaps(stock("llama"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a model of transformers"):
        record_swaps(nn.Linear(1, 1))  # type: ignore[arg-type]
