"""T5 and mT5: scores without a scale, biased by relative position; the first layer's bias serves its whole stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.host import RELATIVE, Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, is_causal
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from hypermlp.integrations.registry import Adapter
from hypermlp.integrations.sites import CROSS_ATTENTION


class T5SelfAttention(HuggingFaceAttention):
    """Called with ``mask`` and a bias of scores, which it hands on to the layers after it and does not use."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, mask: Tensor | None = None, *, position_bias: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, weights = super().forward(hidden_states, mask, **others)
        return out, position_bias, weights


class T5Adapter(HuggingFaceAdapter):
    """``{encoder,decoder}.block.{i}.layer.0.SelfAttention``; ``EncDecAttention`` stays the host's."""

    wrapper = T5SelfAttention
    arguments = frozenset({"mask", "position_bias", "key_value_states"})

    def at(self, model: nn.Module, name: str) -> Adapter:
        return self if name.endswith("SelfAttention") else CROSS_ATTENTION

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.d_model,
            num_heads=module.n_heads,
            causal=module.is_decoder and is_causal(module),
            layer_idx=module.layer_idx,
            max_length=getattr(module.config, "n_positions", None),
            not_offered=RELATIVE,
        )

    def finish(self, model: Any, swaps: Sequence[Mapping[str, Any]]) -> None:
        for stack in model.modules():
            blocks: Any = getattr(stack, "block", None)
            if isinstance(blocks, nn.ModuleList):
                found: list[Any] = [module for module in blocks.modules() if hasattr(module, "SelfAttention")]
                swapped = [isinstance(module.SelfAttention, T5SelfAttention) for module in found]
                if any(swapped) and swapped[0] and not all(swapped):
                    raise ValueError(
                        "the first layer of a stack has the position biases of all its layers: replace all of them, or "
                        "leave the first (layers=...)"
                    )
        super().finish(model, swaps)


ADAPTER = T5Adapter()
