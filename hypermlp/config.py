"""One validated description of an attention layer, and the paper's labels for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypedDict, get_args

import torch

from hypermlp.checks import as_flag, as_integer, as_number, as_sizes, check_choice, keep, named_fields
from hypermlp.ops.attention import LagOrPosition
from hypermlp.ops.checks import as_eps

Mixer = Literal["hyperglu", "hypermlp", "relu", "softmax"]
GateActivation = Literal["sigmoid", "identity"]
ConvInit = Literal["identity", "paper"]


@named_fields
@dataclass(frozen=True)
class MixConfig:
    """One sequence mixing ``Diag(identity + diag) + down Diag(core) up^T``.

    Args:
        rank: rank ``R`` of the low-rank term; 0 leaves it out.
        diag: whether there is a learned diagonal.
        identity: whether the identity is part of the map.
    """

    rank: int = 16
    diag: bool = True
    identity: bool = True

    def __post_init__(self) -> None:
        keep(self, ("rank",), as_integer, 0)
        keep(self, ("diag", "identity"), as_flag)
        if not (self.rank or self.diag or self.identity):
            raise ValueError("a mixing without rank, diag and identity maps everything to zero: switch one on")


class HyperFields(TypedDict, total=False):
    """The keywords of a layer's constructor, for editors and type checkers: fields of :class:`HyperConfig`."""

    qk_dim: int | None
    v_dim: int | None
    mix_rank: int
    max_lag: int | None
    conv_size: int | None
    causal: bool
    layout: LagOrPosition | None
    routing_mix: MixConfig | bool | None
    readout_mix: MixConfig | bool | None
    q_gate: bool | None
    output_gate: bool | None
    gate_activation: GateActivation
    norm: bool
    eps: float
    rope: bool
    rope_theta: float
    bias: bool
    conv_init: ConvInit


@named_fields
@dataclass(frozen=True)
class HyperConfig:
    """What an attention layer computes. Frozen; every field is checked.

    Fields left None take the value that the mixer has in the paper's study: a hyper mixer
    compresses queries and keys to a quarter of the width and has convolutions and gates; the
    baselines are plain. ``dataclasses.replace`` keeps what they took: with another ``hidden_size``
    or ``mixer`` give it ``qk_dim=None``, ``v_dim=None`` and so on, to have them chosen anew.

    Args:
        hidden_size: width ``D`` of the model.
        num_heads: heads ``H``.
        mixer: ``"hyperglu"``, ``"hypermlp"``, ``"relu"`` (HyperMLP without sequence mixing) or
            ``"softmax"``.
        qk_dim: total score width, ``S * H * K``. None: ``hidden_size / 4`` for a hyper mixer,
            else ``hidden_size``.
        v_dim: total value width, ``H * V``. None: ``hidden_size``.
        mix_rank: rank of those sequence mixings of a hyper mixer that are True.
        max_lag: rows of the lag tables, and the window of a longer sequence. None: 2048 for a
            hyper mixer, no window for a baseline.
        conv_size: taps of the causal convolutions on key and value inputs, 0 for none. None: 4
            for a hyper mixer, else 0.
        causal: hide later tokens. If not, tables are indexed by position.
        layout: what table rows stand for; None: by lag if causal, else by position.
        routing_mix: first sequence mixing: True for the default, False for none, or a
            :class:`MixConfig`. None: True for a hyper mixer, else False.
        readout_mix: second sequence mixing, likewise.
        q_gate: multiply queries by ``phi(x W + b)``. None: True for a hyper mixer, else False.
        output_gate: multiply the heads' output likewise.
        gate_activation: ``phi``, for these gates and the cores of the mixings.
        norm: divide by the L2 norm of the gate map's row (softmax has its own).
        eps: smallest value of that norm, within the normal numbers of float32 (from 1.2e-38 on).
        rope: rotate queries and keys by position (rotate-half pairing).
        rope_theta: base of its frequencies.
        bias: biases in the query, key, value and output projections.
        conv_init: ``"identity"`` starts each convolution as a small perturbation of the current
            token; ``"paper"`` leaves the identity out.
    """

    # None stands for the mixer's default and is resolved below, so readers never meet it
    hidden_size: int
    num_heads: int = 2
    mixer: Mixer = "hyperglu"
    qk_dim: int = None  # type: ignore[assignment]
    v_dim: int = None  # type: ignore[assignment]
    mix_rank: int = 16
    max_lag: int | None = None
    conv_size: int = None  # type: ignore[assignment]
    causal: bool = True
    layout: LagOrPosition = None  # type: ignore[assignment]
    routing_mix: MixConfig | bool = None  # type: ignore[assignment]
    readout_mix: MixConfig | bool = None  # type: ignore[assignment]
    q_gate: bool = None  # type: ignore[assignment]
    output_gate: bool = None  # type: ignore[assignment]
    gate_activation: GateActivation = "sigmoid"
    norm: bool = True
    eps: float = 1e-12
    rope: bool = False
    rope_theta: float = 10000.0
    bias: bool = False
    conv_init: ConvInit = "identity"

    def __post_init__(self) -> None:
        check_choice("mixer", self.mixer, get_args(Mixer))
        keep(self, ("hidden_size", "num_heads"), as_integer, 1)
        keep(self, ("mix_rank",), as_integer, 0)
        keep(self, ("causal",), as_flag)  # says what layout is by default
        hyper = self.mixer in ("hyperglu", "hypermlp")
        maps = self.num_maps * self.num_heads
        self._default("qk_dim", _share(self.hidden_size, maps) if hyper else self.hidden_size)
        self._default("v_dim", self.hidden_size)
        self._default("conv_size", 4 if hyper else 0)
        self._default("max_lag", 2048 if hyper else None)
        self._default("layout", "lag" if self.causal else "position")
        for name in ("q_gate", "output_gate", "routing_mix", "readout_mix"):
            self._default(name, hyper)
        for name in ("routing_mix", "readout_mix"):
            object.__setattr__(self, name, self._mixing(name, getattr(self, name)))
        self._check_mix_rank()
        self._check()

    def _mixing(self, name: str, given: object) -> MixConfig | bool:
        if isinstance(given, Mapping):
            return MixConfig(**given)
        if isinstance(given, MixConfig):
            return given
        return as_flag(name, given, "True, False or a MixConfig") and MixConfig(rank=self.mix_rank)

    def _check_mix_rank(self) -> None:
        """``replace(config, mix_rank=4)`` would change nothing: a config's mixings have their own ranks."""
        mixes = {n: mix for n in ("routing_mix", "readout_mix") if isinstance(mix := getattr(self, n), MixConfig)}
        ranks = [mix.rank for mix in mixes.values()]
        if mixes and self.mix_rank not in (*ranks, type(self).mix_rank):
            have = ", ".join(f"{name} has rank {mix.rank}" for name, mix in mixes.items())
            remedy = ", ".join(f"{name}=True" for name in mixes)
            raise ValueError(
                f"mix_rank={self.mix_rank} changes nothing, {have}: pass {remedy} with it, or leave it out"
            )

    def _check(self) -> None:
        check_choice("layout", self.layout, get_args(LagOrPosition))
        check_choice("gate_activation", self.gate_activation, get_args(GateActivation))
        check_choice("conv_init", self.conv_init, get_args(ConvInit))
        keep(self, ("qk_dim", "v_dim", *(("max_lag",) if self.max_lag is not None else ())), as_integer, 1)
        keep(self, ("conv_size",), as_integer, 0)
        keep(self, ("q_gate", "output_gate", "norm", "rope", "bias"), as_flag)
        keep(self, ("eps", "rope_theta"), as_number)
        # one config serves layers of every dtype
        as_eps(self.eps, torch.float32)
        maps = self.num_maps * self.num_heads
        if self.qk_width * maps != self.qk_dim:
            raise ValueError(
                f"{self._width('qk_dim')} does not divide into {maps} score maps "
                f"({self.num_maps} a head, {self.num_heads} heads): choose a multiple of {maps}"
            )
        if self.v_width * self.num_heads != self.v_dim:
            raise ValueError(f"{self._width('v_dim')} does not divide into {self.num_heads} heads: choose a multiple")
        if self.rope and self.qk_width % 2:
            raise ValueError(
                f"rope turns pairs of channels: the score width {self.qk_width} must be even, "
                f"which {self._width('qk_dim')} over {maps} score maps is not: choose a multiple of {2 * maps}"
            )
        if self.layout == "lag" and not self.causal:
            raise ValueError("layout='lag' needs causal=True: use layout='position' for bidirectional layers")
        if self.mixer in ("relu", "softmax") and self.causal and self.layout == "position":
            raise ValueError(f"mixer={self.mixer!r} has no tables to index by position: leave layout out")
        if self.mixer in ("relu", "softmax") and (self.routing_mix or self.readout_mix):
            raise ValueError(f"mixer={self.mixer!r} has no sequence mixing: use 'hypermlp' or 'hyperglu'")
        if self.mixer == "softmax" and not self.norm:
            raise ValueError("norm=False is not for softmax, which normalises by itself")

    def _width(self, name: str) -> str:
        """A field for a message, with what it is by default where it is that: the user may have given that alone."""
        value = getattr(self, name)
        return f"{name}=hidden_size={value}" if value == self.hidden_size else f"{name}={value}"

    @cached_property
    def num_maps(self) -> int:
        """Score maps ``S`` a head has: a gate and a scale for HyperGLU, else one."""
        return 2 if self.mixer == "hyperglu" else 1

    @cached_property
    def qk_width(self) -> int:
        """Score width ``K`` of one map."""
        return self.qk_dim // (self.num_maps * self.num_heads)

    @cached_property
    def query_gain(self) -> float:
        """Of the query projection's start: scores of a hyper mixer are not divided by ``sqrt(K)``, and begin near 1."""
        return self.qk_width**-0.5 if self.mixer in ("hyperglu", "hypermlp") else 1.0

    @cached_property
    def v_width(self) -> int:
        """Value width ``V`` of one head."""
        return self.v_dim // self.num_heads

    @property
    def window(self) -> int | None:
        """Tokens a query sees, itself included; None for all of its sequence."""
        return self.max_lag if self.layout == "lag" else None

    @cached_property
    def gate_widths(self) -> tuple[int, int, int, int]:
        """Widths of the gates of queries and output and of the cores of both mixings, 0 where there is none."""
        maps = self.num_maps * self.num_heads
        routing, readout = (
            mix.rank if isinstance(mix, MixConfig) else 0 for mix in (self.routing_mix, self.readout_mix)
        )
        return (
            self.qk_dim if self.q_gate else 0,
            self.v_dim if self.output_gate else 0,
            maps * routing,
            self.num_heads * readout,
        )

    @classmethod
    def from_label(cls, label: str, hidden_size: int, **options: Any) -> HyperConfig:
        """The variant of the paper's study that ``label`` names, ``Base-Feat-Rank-TmixLayout``.

        Base ``S`` softmax, ``R`` ReLU, ``G`` GLU. Feat ``p`` rotary, ``c`` convolutions, ``g``
        gates. Rank ``q`` (``v``) compresses query-key (value-output) width to a quarter, ``h``,
        which is this library's and not the paper's, query-key width to a half. Tmix ``1``, ``2``,
        ``12`` mixing on the routing side, the readout side, both; Layout ``o`` by lag, else by
        position. A final ``!`` (budget not matched) changes nothing here.

        Args:
            label: such as ``"S-pc"``, ``"R-cg-q-12o"``, ``"G-12!"``.
            hidden_size: width of the model.
            options: other fields, which win over what the label says.
        """
        match = _LABEL.fullmatch(label) if isinstance(label, str) else None
        if match is None:
            raise ValueError(
                f"label {label!r} is not Base-Feat-Rank-TmixLayout: "
                "S, R or G, then any of -p, -c, -g joined in that order, -q, -h or -v, -1, -2 or -12 with o, and !"
            )
        base, feat, rank, tmix, by_lag = match.groups(default="")
        if base == "S" and tmix:
            raise ValueError(f"label {label!r}: softmax has no sequence mixing")
        hidden_size, heads = as_sizes(hidden_size=hidden_size, num_heads=options.get("num_heads", cls.num_heads))
        maps = 2 * heads if base == "G" else heads
        mixer = {"S": "softmax", "R": "hypermlp" if tmix else "relu", "G": "hyperglu"}[base]
        fields: dict[str, Any] = {
            "mixer": mixer,
            "qk_dim": _share(hidden_size, maps, {"q": 4, "h": 2}.get(rank, 1)),
            "v_dim": _share(hidden_size, heads, 4 if rank == "v" else 1),
            "conv_size": 4 if "c" in feat else 0,
            "q_gate": "g" in feat,
            "output_gate": "g" in feat,
            "rope": "p" in feat,
            "routing_mix": "1" in tmix,
            "readout_mix": "2" in tmix,
        }
        if tmix and not by_lag:
            fields["layout"] = "position"
        return cls(hidden_size=hidden_size, **(fields | options))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``HyperConfig(**...)`` takes back."""
        return asdict(self)

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)


def _share(width: int, parts: int, of: int = 4) -> int:
    """``width / of``, rounded down to a multiple of ``parts`` and at least that; all of it as it is."""
    return width if of == 1 else parts * max(1, width // (of * parts))


_LABEL = re.compile(r"([SRG])(?:-(?=[pcg])(p?c?g?))?(?:-([qhv]))?(?:-(12|1|2)(o?))?!?")
