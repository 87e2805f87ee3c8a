"""Names of arguments: the home of what transformers' releases call differently, and of what may be ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# since 5.24; before; in GPT-NeoX
CACHE_NAMES = ("cache", "past_key_values", "layer_past")

# what models, blocks and outputs of the installed release say
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})

# what callers hand to a model of the native family that it need not know, each with the reason
IGNORED_BY_MODELS = {
    "num_items_in_batch": "the loss divides by it",
    "output_hidden_states": "transformers records hidden states around the layers",
    "max_length_q": "the bounds of packed documents, cu_seq_lens_q, say it",
    "max_length_k": "the bounds of packed documents, cu_seq_lens_q, say it",
    "cache_position": "the cache counts its tokens",
}

# what hosts hand to their attention and a hyper layer need not know, likewise
IGNORED_BY_ATTENTION = {
    **IGNORED_BY_MODELS,
    "position_ids": "a hyper layer knows lags, and the host's mask says where packed documents begin",
    "position_embeddings": "rotary angles, made from position_ids",
    "use_cache": "a cache is there, or it is not",
    "output_router_logits": "the host's routers are elsewhere",
    "token_type_ids": "the host's embedding reads them",
    "return_dict": "the host wraps its outputs",
}


def one_cache(**named: Any) -> Any:
    """The cache that came under one of its names, or None; ValueError where there are several."""
    given = {name: cache for name, cache in named.items() if cache is not None}
    if len(given) > 1:
        raise ValueError(f"a cache came under each of the names {sorted(given)}: pass one, as {CACHE_NAME}=")
    return next(iter(given.values()), None)
