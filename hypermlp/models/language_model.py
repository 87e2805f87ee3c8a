"""A small decoder-only language model, to read and to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.cache import HyperCache
from hypermlp.checks import as_flag, as_integer, as_number, check_kind, keep, named_fields
from hypermlp.config import HyperConfig
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.block import TransformerBlock
from hypermlp.layers.projection import Embedding, Projection, start_afresh
from hypermlp.ops.attention import Backend

# a model's parts by their names in the Hugging Face family
FAMILY_NAMES = {"embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head"}


def under_family_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A :class:`LanguageModel`'s weights under the names of the Hugging Face family."""
    parts = ((key.partition("."), x) for key, x in state_dict.items())
    return {f"{FAMILY_NAMES[part]}.{rest}": x for (part, _, rest), x in parts}


@named_fields
@dataclass(frozen=True)
class LanguageModelConfig:
    """What a :class:`LanguageModel` computes. Frozen; every field is checked.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the model.
        num_layers: Transformer blocks.
        attention: the attention layer of every block, of the same ``hidden_size`` and causal; a
            mapping of its fields will do.
        intermediate_size: width inside each block's SwiGLU. None: ``8/3 * hidden_size``, rounded
            up to a multiple of 16.
        context_length: tokens the model was trained to look back over; generation recomputes no
            more than these. None for no limit.
        tie_embeddings: let the head share the embedding's weights.
        norm_eps: of the RMSNorms.
        max_lags: lags that each layer's tables know, where ``extend_max_lag`` has made them differ. None:
            ``attention.max_lag`` for all.
    """

    # None stands for a default that is resolved below, so readers never meet it
    vocab_size: int
    hidden_size: int
    num_layers: int
    attention: HyperConfig
    intermediate_size: int = None  # type: ignore[assignment]
    context_length: int | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    max_lags: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        keep(self, ("hidden_size",), as_integer, 1)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", -(-8 * self.hidden_size // 48) * 16)
        if isinstance(self.attention, Mapping):
            object.__setattr__(self, "attention", HyperConfig(**{"hidden_size": self.hidden_size, **self.attention}))
        if not isinstance(self.attention, HyperConfig):
            raise TypeError(f"attention must be a HyperConfig, got {type(self.attention).__name__}")
        given = ("context_length",) if self.context_length is not None else ()
        keep(self, ("vocab_size", "num_layers", "intermediate_size", *given), as_integer, 1)
        if self.attention.hidden_size != self.hidden_size:
            raise ValueError(
                f"attention.hidden_size={self.attention.hidden_size} differs from hidden_size={self.hidden_size}: "
                "make them equal"
            )
        if not self.attention.causal:
            raise ValueError("attention.causal must be True: a language model may not see the tokens it predicts")
        keep(self, ("tie_embeddings",), as_flag)
        keep(self, ("norm_eps",), as_number)
        if self.max_lags is not None:
            self._take_max_lags(self.max_lags)

    def _take_max_lags(self, lags: object) -> None:
        """A tuple, or where all are alike the layers' one description."""
        if not isinstance(lags, (list, tuple)) or len(lags) != self.num_layers:
            raise ValueError(f"max_lags must be a number for each of num_layers={self.num_layers}, got {lags!r}")
        lags = [as_integer("max_lags", lag, 1) for lag in lags]
        if self.attention.mixer not in ("hyperglu", "hypermlp"):
            raise ValueError(f"max_lags is for tables, which mixer={self.attention.mixer!r} has not: leave it out")
        alike = len(set(lags)) == 1
        if alike:
            object.__setattr__(self, "attention", replace(self.attention, max_lag=lags[0]))
        object.__setattr__(self, "max_lags", None if alike else tuple(lags))

    def attention_config(self, layer_idx: int) -> HyperConfig:
        """What the attention of layer ``layer_idx`` computes."""
        return self.attention if self.max_lags is None else replace(self.attention, max_lag=self.max_lags[layer_idx])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``LanguageModelConfig(**...)`` takes back; without ``max_lags`` where it is None."""
        return {name: value for name, value in asdict(self).items() if name != "max_lags" or value is not None}


class LanguageModel(nn.Module):
    """Embedding, :class:`~hypermlp.layers.block.TransformerBlock` s, RMSNorm, head.

    Args:
        config: the model.
        backend: path of the operator, see :func:`hypermlp.ops.hyper_attention`.
        device, dtype: of the parameters.

    Example:
        >>> config = LanguageModelConfig(256, 64, 2, HyperConfig(64, max_lag=128))
        >>> LanguageModel(config)(torch.zeros(1, 10, dtype=torch.long)).shape
        torch.Size([1, 10, 256])
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_kind(
            "config", config, LanguageModelConfig, "LanguageModelConfig(vocab_size, hidden_size, num_layers, ...)"
        )
        super().__init__()
        self._config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.attention_config(index),
                config.intermediate_size,
                num_layers=config.num_layers,
                norm_eps=config.norm_eps,
                backend=backend,
                layer_idx=index,
                **factory,
            )
            for index in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, **factory)
        # a tied head is a call of the embedding, so that a state dict holds the shared weights once
        self.head = (
            None if config.tie_embeddings else Projection(config.hidden_size, config.vocab_size, bias=False, **factory)
        )

    @property
    def config(self) -> LanguageModelConfig:
        """What the model computes as it stands: blocks may have gone, and tables have other sizes, one by one too."""
        c, layers = self._config, [getattr(block, "attention", None) for block in self.blocks]
        if len(layers) != c.num_layers:
            if not layers or not all(isinstance(layer, AttentionLayer) for layer in layers):
                return c  # blocks in groups, or wrapped
            c = replace(c, num_layers=len(layers), max_lags=None)
        if c.attention.mixer not in ("hyperglu", "hypermlp"):
            return c  # windows, which are no tables
        described = tuple(c.attention_config(index).max_lag or 0 for index in range(c.num_layers))
        kind = c.attention.mixer, c.attention.layout
        known = tuple(
            layer.config.max_lag or 0
            if isinstance(layer, AttentionLayer) and (layer.mixer, layer.config.layout) == kind
            else lag
            for layer, lag in zip(layers, described, strict=True)
        )
        if known == described:
            return c
        context = c.context_length if c.context_length is None else max(c.context_length, *known)
        return replace(c, max_lags=known, context_length=context)

    @config.setter
    def config(self, config: LanguageModelConfig) -> None:
        check_kind("config", config, LanguageModelConfig)
        self._config = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        # older pickles have it as an attribute
        renamed = {"_config" if name == "config" else name: value for name, value in state.items()}
        super().__setstate__(renamed)  # type: ignore[no-untyped-call]

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, under the name that training and serving engines look for."""
        return self.blocks

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("blocks" if name == "layers" else name, value)

    def reset_parameters(self) -> None:
        """Start every parameter afresh; each part says its own start.

        Embedding and head are ``N(0, 1 / hidden_size)``. The forward multiplies embeddings by
        ``sqrt(hidden_size)`` (Vaswani et al., arXiv 1706.03762, section 3.4), so that a token enters
        the residual stream with unit variance and is not drowned by the first block.
        """
        for part in self.children():
            start_afresh(part)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: HyperCache | None = None,
    ) -> Tensor:
        """Logits of the token after each.

        Args:
            input_ids: int64 or int32 ``[B, T]``.
            attention_mask: bool or integer ``[B, T]``, 1 for a valid token.
            cu_seqlens: bounds of packed sequences, int32 or int64 ``[N + 1]``, with ``B = 1``.
            cache: earlier tokens, which these follow and are added to; inference only.

        Returns:
            ``[B, T, vocab_size]``. Those of padded tokens mean nothing.
        """
        check_kind("input_ids", input_ids, Tensor)
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids must be int64 or int32 [batch, length], got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        if cache is not None:
            check_kind("cache", cache, HyperCache)
            if not cache.layers:
                self._check_places()
        hidden_states = self.embedding(input_ids) * self._config.hidden_size**0.5
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask, cu_seqlens=cu_seqlens, cache=cache)
        hidden_states = self.norm(hidden_states)
        logits: Tensor = self.embedding(hidden_states, head=True) if self.head is None else self.head(hidden_states)
        return logits

    def _check_places(self) -> None:
        """ValueError where two places of the model would share a part of a cache."""
        found = [m.layer_idx for block in self.blocks for m in block.modules() if isinstance(m, AttentionLayer)]
        if len(set(found)) != len(found):
            raise ValueError(
                f"blocks use the cache's parts {found} and each needs its own: give every attention layer another "
                "layer_idx; blocks that share weights at several depths have no cache"
            )

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats per token, see :func:`next_token_loss`.

        ``targets`` are not shifted here: ``loss(ids[:, :-1], ids[:, 1:])`` of texts ``ids``.
        """
        return next_token_loss(self(input_ids, attention_mask, cu_seqlens=cu_seqlens), targets)

    def num_parameters(self) -> int:
        """Trained numbers, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, computed in float32.

    Args:
        logits: ``[B, T, vocab_size]``.
        targets: int64 ``[B, T]``: the token after each input (already shifted), -100 where there
            is none to predict.
    """
    check_kind("logits", logits, Tensor)
    check_kind("targets", targets, Tensor)
    if not logits.is_floating_point() or targets.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"logits must be floating point and targets int64, got {logits.dtype} and {targets.dtype}")
    if targets.shape != logits.shape[:2]:
        raise ValueError(f"targets must be {tuple(logits.shape[:2])} like the logits, got {tuple(targets.shape)}")
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
