"""What every attention layer here shares: projections, convolutions, gates, and one forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from hypermlp.cache import CacheSpec, HyperCache, LayerCache, StaticLayerCache
from hypermlp.config import HyperConfig, HyperFields, Mixer
from hypermlp.layers.feature_mixing import GateProjection, Gates
from hypermlp.layers.projection import Projection, start_afresh
from hypermlp.layers.rotary import rotate
from hypermlp.layers.short_conv import ShortConv
from hypermlp.ops.attention import Backend
from hypermlp.ops.checks import check_attention_mask, check_cu_seqlens, check_plain
from hypermlp.ops.decode import Past
from hypermlp.ops.modes import traced, values_readable
from hypermlp.ops.varlen import Tokens, sequence_origins, unpacked, within_bounds, zero_padded

NO_GATES = Gates()


class AttentionLayer(nn.Module, ABC):
    """From hidden states to output by way of queries, keys and values.

    Subclasses say in :meth:`attend` how heads read from one another. All that is computed stands
    in ``config``, a :class:`~hypermlp.HyperConfig`.
    """

    mixer: ClassVar[Mixer]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 2,
        *,
        backend: Backend = "auto",
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Unpack[HyperFields],
    ) -> None:
        """A layer of ``[B, T, hidden_size]`` to the same; ``fields`` are those of :class:`~hypermlp.HyperConfig`.

        Args:
            hidden_size: width ``D`` of the model.
            num_heads: heads; the paper uses 2.
            backend: path of the operator, see :func:`hypermlp.ops.hyper_attention`; ``"triton"`` takes the fused
                kernel for the convolutions too. Softmax attention is PyTorch's whatever it says.
            layer_idx: place in a model, for caches.
            device, dtype: of the parameters.
            qk_dim: total score width. ``hidden_size / 4`` by default; of the baselines ``hidden_size``.
            v_dim: total value width, ``hidden_size`` by default.
            mix_rank: rank of both sequence mixings, 16 by default, 0 for none. The baselines have no mixing.
            max_lag: lags the tables know, 2048 by default. A longer sequence is, exactly, a window over the last
                ``max_lag`` tokens. Of the baselines the window alone, None by default for none.
            conv_size: taps of the causal convolutions on key and value inputs, 4 by default, 0 for none; the
                baselines have none by default.
            causal: hide later tokens, True by default. If not, tables are indexed by position and a sequence may
                not be longer than ``max_lag``.
            layout: what rows of the tables stand for, ``"lag"`` or ``"position"``. By default by lag if causal.
            routing_mix: first sequence mixing: True (the default), False, or a :class:`~hypermlp.MixConfig`.
            readout_mix: second sequence mixing, likewise.
            q_gate: multiply queries by an input-conditioned gate: True by default, False of the baselines.
            output_gate: multiply the heads' output by one, likewise.
            gate_activation: ``"sigmoid"`` or ``"identity"``, for these gates and the mixings' cores.
            norm: divide by the L2 norm of the (gate) map's row, True by default.
            eps: smallest value of that norm, 1e-12 by default.
            rope: rotate queries and keys; the paper finds no gain from it in hyper layers.
            rope_theta: base of its frequencies, 10000 by default.
            bias: biases in the four projections, False by default.
            conv_init: ``"identity"``, or ``"paper"`` for the authors' start.

        Raises:
            ValueError, TypeError: naming the argument, its value and the remedy.
        """
        super().__init__()
        config = HyperConfig(hidden_size, num_heads, self.mixer, **fields)  # type: ignore[arg-type]
        self.config, self.backend, self.layer_idx = config, backend, layer_idx
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden, qk_dim, v_dim = hidden_size, config.qk_dim, config.v_dim
        self.q_proj = Projection(hidden, qk_dim, bias=config.bias, gain=config.query_gain, **factory)
        self.k_proj = Projection(hidden, qk_dim, bias=config.bias, **factory)
        self.v_proj = Projection(hidden, v_dim, bias=config.bias, **factory)
        self.o_proj = Projection(v_dim, hidden, bias=config.bias, **factory)
        self.k_conv = self._conv(factory)
        self.v_conv = self._conv(factory)
        widths = config.gate_widths
        self.gate = GateProjection(hidden, widths, config.gate_activation, **factory) if any(widths) else None
        self._add_parts(factory)

    def _add_parts(self, factory: dict[str, Any]) -> None:
        """Modules that a kind of layer has beside these; ``factory`` says where and of which dtype."""

    @property
    def config(self) -> HyperConfig:
        """All that is computed; a new one is for whoever changes the parameters' sizes."""
        return self._config

    @config.setter
    def config(self, config: HyperConfig) -> None:
        self._configure(config)

    def _configure(self, config: HyperConfig) -> None:
        """Take ``config``, and make of it what every call reads."""
        self._config = config
        self._cache_spec = CacheSpec.of(config) if config.causal else None

    @property
    def cache_spec(self) -> CacheSpec | None:
        """Sizes of this layer's part of a cache; None for a bidirectional layer, which has none."""
        return self._cache_spec

    def _conv(self, factory: dict[str, Any]) -> ShortConv | None:
        config = self.config
        if not config.conv_size:
            return None
        return ShortConv(config.hidden_size, config.conv_size, identity=config.conv_init == "identity", **factory)

    def reset_parameters(self) -> None:
        """Start every parameter afresh.

        Each part says its own start, so that resetting the parts one by one, in any order, is the same.
        """
        for part in self.children():
            start_afresh(part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **self.with_part(args, kwargs))

    def with_part(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call with this layer's part in the place of its cache, if it is the layer's turn.

        Outside of what ``compile()`` compiles: a graph that finds its part by ``layer_idx`` serves one layer alone.
        """
        cache = kwargs.get("cache")
        if not isinstance(cache, HyperCache):
            return kwargs
        part = self.cache_part(cache)
        x = args[0] if args else kwargs.get("hidden_states")
        packed = kwargs.get("cu_seqlens") is not None
        cache.take_turn(self, self.layer_idx, part, None if packed or not isinstance(x, Tensor) else x.shape[-2])
        return kwargs | {"cache": part}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: HyperCache | LayerCache | StaticLayerCache | None = None,
    ) -> Tensor:
        """One attention layer over a batch, or over the tokens that follow a cache.

        Args:
            hidden_states: ``[B, T, hidden_size]``; of no rows or no tokens the output is empty, too.
            attention_mask: bool or integer ``[B, T]``, 1 for a valid token. Padded tokens, left,
                right or inside, are as if they did not exist, and get zeros.
            cu_seqlens: bounds of packed sequences, int32 or int64 ``[N + 1]``, with ``B = 1``. Tokens outside
                all of them are padding; equal neighbours are an empty sequence. With a cache they must
                come first, and are its ``N`` rows from then on.
            cache: earlier tokens, which these follow and are added to; inference only. The mask
                then counts the new tokens, or all of them. :meth:`cache_part` of it will do.

        Returns:
            ``[B, T, hidden_size]``.
        """
        self._check_input(hidden_states)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, hidden_states)
        if cache is not None:
            return self._forward_cached(hidden_states, attention_mask, cu_seqlens, self.cache_part(cache))
        if attention_mask is not None:
            attention_mask = check_attention_mask(attention_mask, hidden_states)
        inside = within_bounds(hidden_states.shape[1], cu_seqlens, hidden_states.device)
        x = zero_padded(zero_padded(hidden_states, attention_mask), inside)
        offset = self._rotary_offset(x, attention_mask, cu_seqlens)
        gates = self.gates(x)
        q = self.queries(x, gates, offset)
        k, v = self.keys_values(x, cu_seqlens, offset)
        o = self.attend(q, k, v, gates, attention_mask, cu_seqlens)
        return zero_padded(zero_padded(self.output(o.flatten(-2), gates), attention_mask), inside)

    def cache_part(self, cache: HyperCache | LayerCache | StaticLayerCache) -> LayerCache | StaticLayerCache:
        """This layer's part of ``cache``, or ``cache`` where it is that; ValueError for a bidirectional layer."""
        if traced():
            raise RuntimeError(
                "torch.jit.trace records one run, and a cache changes from run to run: trace without cache=, "
                "or compile a step with HyperCache(static=True, max_length=...) by torch.compile"
            )
        spec = self._cache_spec or CacheSpec.of(self.config)
        if isinstance(cache, HyperCache):
            return cache.layer(self.layer_idx, spec)
        if cache.spec is not spec and cache.spec != spec:
            raise ValueError(f"cache is another layer's part: {cache.spec}, not {spec}")
        return cache

    def _forward_cached(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LayerCache | StaticLayerCache,
    ) -> Tensor:
        new = hidden_states.shape[1]
        if not new:
            return hidden_states.new_empty(hidden_states.shape)  # nothing to take in
        if cu_seqlens is not None and not state.empty:
            raise ValueError("cu_seqlens is for the first call of a cache: later tokens come as a batch of its rows")
        valid = None if attention_mask is None else self._new_tokens_mask(attention_mask, hidden_states, state)
        if new == 1 and not state.empty:
            return self._step(hidden_states[:, 0], valid, state)[:, None]
        inside = within_bounds(hidden_states.shape[1], cu_seqlens, hidden_states.device)
        x = zero_padded(zero_padded(hidden_states, valid), inside)
        offset = self._rotary_offset(x, valid, cu_seqlens) if state.empty else state.offset(valid)
        gates = self.gates(x)
        q = self.queries(x, gates, offset)
        state.check(q, new)
        if state.empty:
            k, v = (zero_padded(y, valid) for y in self.keys_values(x, cu_seqlens, offset))
            o = self.attend(q, k, v, gates, valid, cu_seqlens)
            state.append(*unpacked(k, v, x, valid, cu_seqlens))
        else:
            # a hidden token's keys and values still hold what its convolutions saw of earlier ones
            k, v = (zero_padded(y, valid) for y in self.keys_values(x, None, offset, past=state.inputs(x)))
            o = self.attend_block(q, gates, state.extended(k, v, valid))
            state.append(k, v, x, valid)
        return zero_padded(zero_padded(self.output(o.flatten(-2), gates), valid), inside)

    def _step(self, x: Tensor, valid: Tensor | None, state: LayerCache | StaticLayerCache) -> Tensor:
        """One token a row after a cache, ``[B, hidden_size]`` to the same: heads and time have no dimensions here."""
        if valid is not None:
            x = zero_padded(x, valid)
        config = self._config
        offset = state.offset(valid) if config.rope else 0
        gates = self.gates(x)
        q = self._gated_queries(x, gates, offset)
        state.check(q, 1)
        window = state.window(x) if config.conv_size else x
        k_conv, v_conv = self.k_conv, self.v_conv
        k = self._rotated(self.k_proj(window if k_conv is None else k_conv(window, newest=True)), offset)
        v = self.v_proj(window if v_conv is None else v_conv(window, newest=True))
        if valid is not None:
            k, v = zero_padded(k, valid), zero_padded(v, valid)
        out = self.output(self.attend_step(q, gates, state.step(k, v, valid)), gates)
        return out if valid is None else zero_padded(out, valid)

    @staticmethod
    def _new_tokens_mask(
        attention_mask: Tensor | None, x: Tensor, state: LayerCache | StaticLayerCache
    ) -> Tensor | None:
        """The mask of the new tokens, bool ``[B, T]``; None where all are valid."""
        if attention_mask is None:
            return None
        new_tokens = x.shape[1]
        if attention_mask.ndim == 2 and attention_mask.shape[1] != new_tokens:
            length = state.known_length
            if length is not None and attention_mask.shape[1] != length + new_tokens:
                raise ValueError(
                    f"attention_mask must count the {new_tokens} new tokens or all {length + new_tokens}, "
                    f"got {attention_mask.shape[1]}"
                )
            attention_mask = attention_mask[:, -new_tokens:]
        valid = check_attention_mask(attention_mask, x)
        return None if values_readable(valid) and bool(valid.all()) else valid

    def gates(self, x: Tensor) -> Gates:
        """Everything of the form ``phi(x W + b)``, from one product."""
        gate = self.gate
        return NO_GATES if gate is None else gate(x)

    def queries(self, x: Tensor, gates: Gates, offset: int | Tensor = 0) -> Tensor:
        """``(x Wq) * phi(x Wm1 + b)``, ``[B, T, S*H, K]``; the rotation comes before the gate."""
        return _heads(self._gated_queries(x, gates, offset), self.config.qk_width)

    def _gated_queries(self, x: Tensor, gates: Gates, offset: int | Tensor) -> Tensor:
        q = self._rotated(self.q_proj(x), offset)
        return q if gates.query is None else q * gates.query

    def keys_values(
        self, x: Tensor, cu_seqlens: Tensor | None, offset: int | Tensor = 0, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``conv(x) Wk`` ``[B, T, S*H, K]`` and ``conv'(x) Wv`` ``[B, T, H, V]``."""
        options = {"cu_seqlens": cu_seqlens, "past": past, "backend": self.backend}
        k = self.k_proj(x if self.k_conv is None else self.k_conv(x, **options))
        v = self.v_proj(x if self.v_conv is None else self.v_conv(x, **options))
        return _heads(self._rotated(k, offset), self.config.qk_width), _heads(v, self.config.v_width)

    def output(self, o: Tensor, gates: Gates) -> Tensor:
        """``(o * phi(x Wm2 + b)) Wo``, ``[..., hidden_size]``, of the heads' ``o`` ``[..., H*V]``."""
        out: Tensor = self.o_proj(o if gates.output is None else o * gates.output)
        return out

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """What each head reads, ``[B, T, H, V]``."""

    @abstractmethod
    def attend_step(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        """What the newest token, ``q`` ``[B, S*H*K]``, reads from all that ``past`` holds, ``[B, H*V]``."""

    @abstractmethod
    def attend_block(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        """What a block of the newest tokens reads from all that ``past`` holds, ``[B, m, H, V]``."""

    def _rotated(self, x: Tensor, offset: int | Tensor) -> Tensor:
        """Every head of ``[B, T, qk_dim]``, or ``[B, qk_dim]`` of one token each, turned by its token's number."""
        if not self.config.rope:
            return x
        if x.ndim == 2:
            return self._rotated(x[:, None], offset)[:, 0]
        return rotate(_heads(x, self.config.qk_width), self.config.rope_theta, offset).flatten(-2)

    def _rotary_offset(self, x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> int | Tensor:
        """Angles count from each sequence's first valid token: a gate after the rotation feels where they start."""
        if not self.config.rope or (attention_mask is None and cu_seqlens is None):
            return 0
        return -sequence_origins(Tokens(attention_mask, cu_seqlens), x.shape[0], x.shape[1], x.device)

    def _check_input(self, hidden_states: Tensor) -> None:
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states must be a tensor, got {type(hidden_states).__name__}")
        if not hidden_states.is_floating_point():
            raise TypeError(f"hidden_states must be floating point, got {hidden_states.dtype}")
        if hidden_states.is_nested:
            check_plain("hidden_states", hidden_states)
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states must be [batch, length, {self.config.hidden_size}], got {tuple(hidden_states.shape)}"
            )

    def extra_repr(self) -> str:
        c = self.config
        parts = [f"{c.hidden_size}", f"num_heads={c.num_heads}", f"qk_dim={c.qk_dim}", f"v_dim={c.v_dim}"]
        if c.max_lag is not None:
            parts.append(f"max_lag={c.max_lag}")
        if not c.norm:
            parts.append("norm=False")
        if c.rope:
            parts.append(f"rope_theta={c.rope_theta:g}")
        if not c.causal:
            parts.append("causal=False")
        if c.layout == "position" and c.causal:
            parts.append("layout='position'")
        return ", ".join(parts)


def _heads(x: Tensor, width: int) -> Tensor:
    """``[..., heads * width]`` as ``[..., heads, width]``."""
    return x.view(*x.shape[:-1], x.shape[-1] // width, width)
