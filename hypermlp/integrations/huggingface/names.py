"""The home of what transformers' releases call differently."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# since 5.24; before; in GPT-NeoX before
CACHE_NAMES = ("cache", "past_key_values", "layer_past")

# what models, blocks and outputs of the installed release say
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def one_cache(**named: Any) -> Any:
    """The cache that came under one of its names, or None; ValueError where there are several."""
    given = {name: cache for name, cache in named.items() if cache is not None}
    if len(given) > 1:
        raise ValueError(f"a cache came under each of the names {sorted(given)}: pass one, as {CACHE_NAME}=")
    return next(iter(given.values()), None)
