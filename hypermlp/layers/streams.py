"""From hidden states to queries, keys, values and gates, and from the heads' output back: a layer's parameters."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Unpack

from hypermlp.checks import as_integer, check_names
from hypermlp.config import HyperConfig, HyperFields, Mixer
from hypermlp.layers.feature_mixing import GateProjection, Gates
from hypermlp.layers.projection import Projection, start_afresh
from hypermlp.layers.rotary import rotate
from hypermlp.layers.short_conv import ShortConv
from hypermlp.ops.attention import Backend, check_backend
from hypermlp.ops.varlen import ALL_TOKENS, Tokens

_NO_GATES = Gates()
_KEYWORDS = (*HyperFields.__annotations__, "num_heads", "backend", "layer_idx", "device", "dtype")


class Streams(NamedTuple):
    """What heads read of some tokens: ``q``, ``k`` ``[B, T, S*H, K]``, ``v`` ``[B, T, H, V]``, and the gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates


class Projections(nn.Module):
    """The parameters of an attention layer, and what each makes of tokens.

    All that is computed stands in ``config``, a :class:`~hypermlp.HyperConfig`.
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

        A field that may be None is then as by default, for a hyper layer with gates, mixings and convolutions: False
        leaves a gate or a mixing out, 0 the convolutions.

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
        check_names(type(self).__name__, fields, _KEYWORDS)
        check_backend(backend)  # a module would be taken for a part
        if layer_idx is not None:
            layer_idx = as_integer("layer_idx", layer_idx, 0)
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

    def gates(self, x: Tensor) -> Gates:
        """Everything of the form ``phi(x W + b)``, from one product."""
        gate = self.gate
        return _NO_GATES if gate is None else gate(x)

    def queries(self, x: Tensor, gates: Gates, offset: int | Tensor = 0) -> Tensor:
        """``(x Wq) * phi(x Wm1 + b)``, ``[B, T, S*H, K]``; the rotation comes before the gate."""
        return rearrange(self._gated_queries(x, gates, offset), "b t (h k) -> b t h k", k=self._config.qk_width)

    def _gated_queries(self, x: Tensor, gates: Gates, offset: int | Tensor) -> Tensor:
        q = self._rotated(self.q_proj(x), offset)
        return q if gates.query is None else q * gates.query

    def _rotated(self, x: Tensor, offset: int | Tensor) -> Tensor:
        """Every head of ``[B, T, qk_dim]``, or ``[B, qk_dim]`` of one token each, turned by its token's number."""
        if not self._config.rope:
            return x
        if x.ndim == 2:
            return self._rotated(x[:, None], offset)[:, 0]
        width = self._config.qk_width
        heads = x.view(*x.shape[:-1], x.shape[-1] // width, width)
        return rotate(heads, self._config.rope_theta, offset).flatten(-2)

    def keys_values(
        self, x: Tensor, tokens: Tokens = ALL_TOKENS, offset: int | Tensor = 0, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``conv(x) Wk`` ``[B, T, S*H, K]`` and ``conv'(x) Wv`` ``[B, T, H, V]``, zero for masked tokens."""
        options = {"cu_seqlens": tokens.cu_seqlens, "past": past, "backend": self.backend}
        k = self.k_proj(x if self.k_conv is None else self.k_conv(x, **options))
        v = self.v_proj(x if self.v_conv is None else self.v_conv(x, **options))
        # a masked token's keys and values still hold what its convolutions saw of earlier ones
        k, v = (tokens.masked_zeroed(y) for y in (self._rotated(k, offset), v))
        return (
            rearrange(k, "b t (h k) -> b t h k", k=self._config.qk_width),
            rearrange(v, "b t (h v) -> b t h v", v=self._config.v_width),
        )

    def output(self, o: Tensor, gates: Gates) -> Tensor:
        """``(o * phi(x Wm2 + b)) Wo``, ``[..., hidden_size]``, of the heads' ``o`` ``[..., H*V]``."""
        out: Tensor = self.o_proj(o if gates.output is None else o * gates.output)
        return out

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
