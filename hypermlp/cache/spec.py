"""What one layer's cache holds."""

from __future__ import annotations

from dataclasses import dataclass

from hypermlp.checks import check_kind
from hypermlp.config import HyperConfig


@dataclass(frozen=True)
class CacheSpec:
    """Sizes of one layer's cache: a cache filled by one layer refuses a layer of other sizes.

    Attributes:
        key_heads: score maps ``S*H``, each of ``key_width`` numbers a token.
        key_width: ``K``.
        value_heads: heads ``H``, each of ``value_width`` numbers a token.
        value_width: ``V``.
        hidden_size: width of the hidden states that convolutions read.
        taps: past hidden states they read, 0 without convolution.
        by_lag: whether tables are indexed by lag; by position a sequence may not be longer than
            ``max_lag``.
        max_lag: rows of the tables, or None.
        keys_transposed: whether keys lie, and are handed out, with tokens along the last dimension: for a layer
            that multiplies by all of them at once, and not for PyTorch's attention.
    """

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int
    hidden_size: int
    taps: int
    by_lag: bool
    max_lag: int | None
    keys_transposed: bool

    @classmethod
    def of(cls, config: HyperConfig) -> CacheSpec:
        """The cache of the layer that ``config`` describes."""
        check_kind("config", config, HyperConfig, "a layer has it as layer.config")
        if not config.causal:
            raise ValueError("a bidirectional layer (causal=False) has no cache: every token sees later ones")
        return cls(
            key_heads=config.num_maps * config.num_heads,
            key_width=config.qk_width,
            value_heads=config.num_heads,
            value_width=config.v_width,
            hidden_size=config.hidden_size,
            taps=max(0, config.conv_size - 1),
            by_lag=config.layout == "lag",
            max_lag=config.max_lag,
            keys_transposed=config.mixer != "softmax",
        )

    @property
    def numbers_per_token(self) -> int:
        """Numbers that keys and values of one token take."""
        return self.key_heads * self.key_width + self.value_heads * self.value_width

    @property
    def window(self) -> int | None:
        """Tokens a query sees, itself included; None for all."""
        return self.max_lag if self.by_lag else None
