"""Llama and the decoders built like it: rotary angles, grouped keys and values, projections apart or joint."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import (
    BOTH_SIDES,
    HuggingFaceAdapter,
    halves,
    is_causal,
    rotary_base,
    separate,
)

# models that rotate neighbours, (0, 1), (2, 3), ..., where Llama rotates halves
_NEIGHBOURS = ("codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium")
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
_OUTPUTS = ("o_proj", "out_proj", "dense")


class LlamaAdapter(HuggingFaceAdapter):
    """``model.layers.{i}.self_attn``."""

    def skip(self, module: Any) -> str | None:
        if not is_causal(module) and _window(module) is not None:
            return BOTH_SIDES
        return super().skip(module)

    def describe(self, module: Any) -> Host:
        config = module.config
        why = _other_scores(module)
        return Host(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            causal=is_causal(module),
            layer_idx=module.layer_idx,
            max_length=config.max_position_embeddings,
            window=_window(module),
            rope_theta=rotary_base(config, _layer_type(module)) if _rotates(module) else None,
            output_dropout=_output_dropout(module),
            projections=None if why else lambda: self.projections(module),
            not_offered=why,
        )

    def projections(self, module: Any) -> Projections:
        """Its weights, for ``init="from_attention"``."""
        config = module.config
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        # of GPT-J older releases say it in their forward alone
        scaling = getattr(module, "scaling", module.head_dim**-0.5)
        output = next(name for name in _OUTPUTS if hasattr(module, name))
        joint, last = getattr(module, "qkv_proj", None), getattr(module, output)
        if joint is None:
            made = separate(module, ("q_proj", "k_proj", "v_proj", output), heads, scaling, key_heads)
        elif hasattr(module, "mp_num"):  # CodeGen: query, value and key of each of the processes that trained it
            parts = joint.weight.unflatten(0, (module.mp_num, 3, -1))
            query, value, key = (Projection.of(part.flatten(0, 1), None, heads) for part in parts.unbind(1))
            made = Projections(query, key, value, (last.weight, last.bias), scaling)
        else:
            made = Projections.of_joint(joint.weight, joint.bias, last, heads, scaling, key_heads)
        if config.model_type in _NEIGHBOURS:
            made = made._replace(query=halves(made.query), key=halves(made.key))
        return made


def _layer_type(module: Any) -> str | None:
    types = getattr(module.config, "layer_types", None)
    return types[module.layer_idx] if types else None


def _window(module: Any) -> int | None:
    """Tokens a query sees where this layer has a window, by its type, its own attribute, or the config alone."""
    kind, window = _layer_type(module), getattr(module.config, "sliding_window", None)
    if kind is None:
        window = getattr(module, "sliding_window", window)
    return window if kind in (None, "sliding_attention") else None


def _rotates(module: Any) -> bool:
    if module.config.model_type == "cohere2":
        return _window(module) is not None
    return bool(getattr(module, "use_rope", True))


def _output_dropout(module: Any) -> float:
    dropout = getattr(module, "resid_dropout", None)
    return float(getattr(module, "residual_dropout", 0.0) if dropout is None else dropout.p)


def _other_scores(module: Any) -> str:
    """Why the host's scores are no products of its projections; empty where they are."""
    norms = [name for name in _NORMS if isinstance(getattr(module, name, None), nn.Module)]
    if norms:
        return f"it normalises queries and keys ({', '.join(norms)}), which a hyper layer does not"
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "it caps its scores (attn_logit_softcapping), which a hyper layer does not"
    if getattr(module.config, "clip_qkv", None) is not None:
        return "it clips queries, keys and values (clip_qkv), which a hyper layer does not"
    return ""


ADAPTER = LlamaAdapter()
