"""Checkpoints of the paper's authors, read into layers of this library.

Their tables are right-aligned: of ``P`` rows (their ``block_size``) the last one is lag 0. Ours
start with lag 0, so importing reverses them. Position-indexed tables keep their order: row ``j``
is position ``j`` of a sequence of ``P`` tokens. There the two differ for shorter sequences, where
theirs move with the length and ours stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hypermlp.checks import as_integer, check_choice, check_kind, did_you_mean
from hypermlp.config import HyperConfig, MixConfig
from hypermlp.layers import HyperGLU, HyperMLP, build_layer
from hypermlp.ops.attention import Backend

_REQUIRED = ("n_embd", "n_head", "block_size")

# the values their config takes for fields that are left out
_DEFAULTS: dict[str, Any] = {
    "bias": False, "qk_rank": None, "vo_rank": None, "conv_kernel_size": 4, "use_kv_conv": True,
    "use_rope": False, "rope_base": 10000.0, "attn_kind": "glu", "attn_norm": "out_scale",
    "gate_act": "sigmoid", "norm_eps": 1e-12, "use_qk_gate": True, "use_vo_gate": True,
    "use_op1": True, "op1_rank": 16, "op1_per_head": True, "op1_use_diag": True, "op1_shortcut": True,
    "op1_do_masking": True,
    "use_op2": True, "op2_rank": 16, "op2_per_head": True, "op2_use_diag": True, "op2_shortcut": True,
    "op2_do_masking": True,
    "do_masking": True, "aligner_kind": "offset",
}  # fmt: skip

# how their code starts and runs, which does not change what a trained layer computes
_WITHOUT_EFFECT = frozenset(
    ("n_layer", "impl_default", "chunk_T", "op1_init_std", "op2_init_std", "aligner_impl_train", "aligner_impl_eval")
)

_CHOICES: dict[str, dict[str, Any]] = {
    "attn_kind": {"glu": "hyperglu", "relu": "hypermlp"},
    "attn_norm": {"l2": True, "out_scale": True, "none": False},  # the first two are one function
    "gate_act": {"sigmoid": "sigmoid", "none": "identity"},
    "aligner_kind": {"offset": "lag", "identity": "position"},
}


class _Name(NamedTuple):
    """Our name of one of their parameters, and how theirs is stored: the parts of a gate are joined."""

    ours: str
    storage: str = "plain"


# in the order of our Gates, which come from one projection
_GATES = ("left_gate", "right_gate", "control1", "control2")

_NAMES: dict[str, _Name] = {
    **{f"{their}.{part}": _Name(f"{our}.{part}")
       for their, our in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("c_proj", "o_proj"))
       for part in ("weight", "bias")},
    **{f"{gate}.{part}": _Name(f"gate.proj.{part}", "gate") for gate in _GATES for part in ("weight", "bias")},
    "conv1.conv.weight": _Name("k_conv.weight", "conv"),
    "conv2.conv.weight": _Name("v_conv.weight", "conv"),
    **{f"{their}.mix.{table}": _Name(f"{our}.{name}", storage)
       for their, our in (("op", "routing_mix"), ("op2", "readout_mix"))
       for table, name, storage in (("d", "diag", "table"), ("U", "down", "table"), ("Vt", "up", "transposed table"))},
}  # fmt: skip


def from_official(
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    backend: Backend = "auto",
    layer_idx: int | None = None,
) -> HyperMLP | HyperGLU:
    """One attention layer of the authors' public implementation, as a layer of this library.

    Args:
        config: the fields of their config. ``n_embd``, ``n_head`` and ``block_size`` must be
            there; others that are left out take their defaults.
        state_dict: the layer's own parameters under their names (``"q.weight"``,
            ``"op.mix.U"``, ...), without the prefix of a surrounding model, all of one dtype and
            on one device. They are copied.
        backend: path of the operator, see :func:`hypermlp.ops.hyper_attention`.
        layer_idx: place in a model, for caches.

    Returns:
        :class:`~hypermlp.HyperGLU` (their ``attn_kind="glu"``) or :class:`~hypermlp.HyperMLP`
        (``"relu"``), with ``max_lag = block_size``, in the dtype and on the device of ``state_dict``.

    Raises:
        ValueError: for a config field or parameter that is unknown or missing, a shape that does
            not fit, and options that are not taken over, saying why: masking that breaks causality
            or length consistency, their rotary embedding for score widths above 2 (it is not a
            rotation), tables shared by all heads.
        TypeError: for a value of ``state_dict`` that is not a floating-point tensor.
    """
    options = official_config(config)
    check_kind("state_dict", state_dict, Mapping)
    layer = cast(HyperMLP, build_layer(options, backend=backend, layer_idx=layer_idx, device="meta"))
    _check_tensors(state_dict)
    _check_names(layer, state_dict)
    _check_shapes(layer, state_dict)
    layer.load_state_dict(convert_official(options, state_dict), assign=True)
    return layer


def official_config(config: Mapping[str, Any]) -> HyperConfig:
    """The description of the layer that the authors' config fields stand for.

    Raises:
        ValueError: as :func:`from_official`.
    """
    check_kind("config", config, Mapping, "vars(their config) is one")
    known = (*_REQUIRED, *_DEFAULTS, *_WITHOUT_EFFECT)
    unknown = sorted(set(config) - set(known))
    if unknown:
        meant = " ".join(filter(None, (did_you_mean(str(name), known) for name in unknown)))
        known_as = "from_official knows those of the authors' HyperGLUConfig"
        raise ValueError(f"unknown config fields {unknown}: {meant or known_as}")
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise ValueError(f"config lacks {missing}")
    c = _DEFAULTS | dict(config)
    chosen = {name: _choose(name, c[name]) for name in _CHOICES}
    _refuse(c)
    hidden_size = c["n_embd"]
    result = HyperConfig(
        hidden_size=hidden_size,
        num_heads=c["n_head"],
        mixer=chosen["attn_kind"],
        qk_dim=hidden_size // 4 if c["qk_rank"] is None else c["qk_rank"],
        v_dim=hidden_size if c["vo_rank"] is None else c["vo_rank"],
        mix_rank=c["op1_rank"],
        max_lag=c["block_size"],
        conv_size=c["conv_kernel_size"] if c["use_kv_conv"] else 0,
        causal=c["do_masking"],
        layout=chosen["aligner_kind"],
        routing_mix=_mix(c, "op1"),
        readout_mix=_mix(c, "op2"),
        q_gate=c["use_qk_gate"],
        output_gate=c["use_vo_gate"],
        gate_activation=chosen["gate_act"],
        norm=chosen["attn_norm"],
        eps=c["norm_eps"],
        rope=c["use_rope"],
        rope_theta=c["rope_base"],
        bias=c["bias"],
        conv_init="paper",
    )
    if result.rope and result.qk_width > 2:
        raise ValueError(
            f"use_rope=True with score width {result.qk_width} is not taken over: for widths above 2 the authors' "
            "rotary embedding turns the two channels of a pair by different angles, so it is no rotation and scores "
            "depend on absolute positions. Weights trained with it have no equivalent here"
        )
    return result


def convert_official(config: HyperConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the authors' parameter names, renamed and laid out as ours; gradients too.

    Args:
        config: of the layer, from :func:`official_config`.
        tensors: parameters, or tensors of the same names and shapes, all or some; gates, which
            are one projection here, all or none.

    Returns:
        Copies under the names of our ``state_dict``.

    Raises:
        ValueError: for a name they do not have, or some gates without the others.
    """
    converted = _joined_gates(config, tensors)
    for their, tensor in tensors.items():
        if their not in _NAMES:
            raise ValueError(f"unknown parameter {their!r}")
        ours, storage = _NAMES[their]
        if storage == "gate":
            continue
        tensor = tensor.detach()
        if storage == "conv":
            tensor = tensor.squeeze(1)
        if storage == "transposed table":
            tensor = tensor.transpose(1, 2)
        if storage in ("table", "transposed table") and config.layout == "lag":
            tensor = tensor.flip(1)
        converted[ours] = tensor.clone(memory_format=torch.contiguous_format)
    return converted


def _joined_gates(config: HyperConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    gates = [gate for gate, width in zip(_GATES, config.gate_widths, strict=True) if width]
    for part in ("weight", "bias"):
        given = [f"{gate}.{part}" for gate in gates if f"{gate}.{part}" in tensors]
        if given and len(given) < len(gates):
            raise ValueError(f"the gates are one projection here: {given} need the others of {gates} too")
        if given:
            converted[f"gate.proj.{part}"] = torch.cat([tensors[name].detach() for name in given])
    return converted


def _choose(field: str, value: Any) -> Any:
    check_choice(field, value, tuple(_CHOICES[field]))
    return _CHOICES[field][value]


def _mix(c: dict[str, Any], op: str) -> MixConfig | bool:
    if not c[f"use_{op}"]:
        return False
    return MixConfig(rank=c[f"{op}_rank"], diag=c[f"{op}_use_diag"], identity=c[f"{op}_shortcut"])


def _refuse(c: dict[str, Any]) -> None:
    """Options of theirs with no equivalent here, each with the reason."""
    by_lag, causal = c["aligner_kind"] == "offset", c["do_masking"]
    if by_lag and not causal:
        raise ValueError(
            "do_masking=False with aligner_kind='offset' is not taken over: rows then mix lags before the start of "
            "the sequence, so an output depends on how long the sequence is. Bidirectional layers are "
            "aligner_kind='identity' with do_masking=False"
        )
    for op in ("op1", "op2"):
        if not c[f"use_{op}"]:
            continue
        if not c[f"{op}_per_head"]:
            raise ValueError(f"{op}_per_head=False is not taken over: tables here belong to one head each")
        as_integer(f"{op}_rank", c[f"{op}_rank"], 1)
    if causal and c["use_op1"] and not c["op1_do_masking"]:
        raise ValueError(
            "op1_do_masking=False is not taken over: the first mixing then fills hidden columns, which enter the "
            "norm and the second mixing: that breaks causality (identity) or length consistency (offset)"
        )
    # by lag the columns it leaves unmasked are dropped on the way back to positions: no effect there
    if causal and not by_lag and c["use_op2"] and not c["op2_do_masking"]:
        raise ValueError(
            "op2_do_masking=False with aligner_kind='identity' is not taken over: the second mixing then puts weight "
            "on later tokens, so the layer is not causal"
        )


def _check_tensors(state_dict: Mapping[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"state_dict[{name!r}] must be a floating-point tensor, got {kind}")
    for attribute in ("dtype", "device"):
        kinds = {getattr(tensor, attribute): name for name, tensor in state_dict.items()}
        if len(kinds) > 1:
            examples = ", ".join(f"{name!r} is {kind}" for kind, name in kinds.items())
            raise ValueError(f"the parameters must share one {attribute}: {examples}; convert them first")


def _check_names(layer: HyperMLP, state_dict: Mapping[str, Tensor]) -> None:
    ours = layer.state_dict()
    absent = tuple(gate for gate, width in zip(_GATES, layer.config.gate_widths, strict=True) if not width)
    expected = {their for their, name in _NAMES.items() if name.ours in ours and not their.startswith(absent)}
    missing, unknown = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    problems = []
    if missing:
        problems.append(f"lacks {missing}")
    if unknown:
        problems.append(f"holds {unknown}, which a layer of this config does not have")
    if problems:
        raise ValueError(
            f"state_dict {' and '.join(problems)} (names of one layer, without the prefix of a surrounding model)"
        )


def _check_shapes(layer: HyperMLP, state_dict: Mapping[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        ours, storage = _NAMES[name]
        expected = tuple(layer.get_parameter(ours).shape)
        if storage == "gate":
            expected = (layer.config.gate_widths[_GATES.index(name.partition(".")[0])], *expected[1:])
        if storage == "conv":
            expected = (expected[0], 1, expected[1])
        elif storage == "transposed table":
            expected = (expected[0], expected[2], expected[1])
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the config makes it {expected}")
