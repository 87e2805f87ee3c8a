"""Weights that accelerate keeps elsewhere and brings in at each module's call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close
from tests.tools.models import language_model, runs, shake, tokens

accelerate = pytest.importorskip("accelerate", reason="the extra test has accelerate")

OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu")),
}


def assert_away(model: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(
    "options",
    [{}, {"tied": False}, {"mixer": "hypermlp", "bias": True}, {"rope": True, "qk_dim": 8, "conv_size": 1}],
    ids=str,
)
def test_offloaded_equals_resident(offload: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = language_model(**options), tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    expected = [runs(model, ids), runs(model, ids, mask)]
    state = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    OFFLOADS[offload](model, tmp_path)
    assert_away(model)
    assert_close(runs(model, ids), expected[0])
    assert_close(runs(model, ids, mask), expected[1])
    assert_away(model)
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_native_hugging_face_model(offload: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from hypermlp.integrations.huggingface.names import CACHE_NAME
    from hypermlp.models.huggingface import HyperMLPConfig, HyperMLPForCausalLM

    torch.manual_seed(1)
    config = HyperMLPConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=2,
        intermediate_size=16,
        attention={"max_lag": 12},
        tie_word_embeddings=tied,
    )
    model = HyperMLPForCausalLM(config).double().eval()
    shake(model)
    ids = tokens(2, 10)

    @torch.no_grad()
    def found() -> dict[str, Tensor]:
        first = model(ids[:, :7], use_cache=True)
        cache = first[CACHE_NAME]
        logits = [first.logits] + [model(token, cache=cache).logits for token in ids[:, 7:].split(1, dim=1)]
        made = model.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
        return {"whole": model(ids).logits, "steps": torch.cat(logits, dim=1), "generated": made}

    expected = found()
    torch.testing.assert_close(expected["steps"], expected["whole"])
    OFFLOADS[offload](model, tmp_path)
    assert_away(model)
    assert_close(found(), expected)
