"""Parameters and FLOPs of a described layer, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypermlp.checks import as_integer, as_sizes, check_kind
from hypermlp.config import HyperConfig, MixConfig
from hypermlp.ops.flops import backward_flops, forward_flops, visible_pairs


@dataclass(frozen=True)
class Count:
    """A number of parameters or FLOPs, by what they belong to.

    Attributes:
        projections: queries, keys, values, output.
        convolutions: on key and value inputs.
        gates: of queries, of the heads' output, and the cores of both sequence mixings.
        mixing: both sequence mixings without their cores.
        attention: scores and readout over all visible pairs (FLOPs only).
    """

    projections: int
    convolutions: int
    gates: int
    mixing: int
    attention: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.convolutions + self.gates + self.mixing + self.attention


def count_parameters(config: HyperConfig) -> Count:
    """Parameters of the layer that ``config`` describes."""
    c = described(config)
    projections = c.hidden_size * (2 * c.qk_dim + 2 * c.v_dim)
    if c.bias:
        projections += 2 * c.qk_dim + c.v_dim + c.hidden_size
    return Count(
        projections=projections,
        convolutions=2 * c.hidden_size * c.conv_size,
        gates=(c.hidden_size + 1) * sum(c.gate_widths),
        mixing=(c.max_lag or 0) * sum(heads * (mix.diag + 2 * mix.rank) for mix, heads in mixings(c)),
    )


def count_flops(config: HyperConfig, batch_size: int, length: int) -> Count:
    """FLOPs of one forward, two for each multiply-add.

    Counts the products over query-key pairs that may see each other, whatever path computes
    them: a causal layer's are half of the square that PyTorch's ``FlopCounterMode`` takes for
    ``scaled_dot_product_attention``. The convolutions are in, which that counter leaves out.
    Biases, activations, diagonals, rotation and the norm are left out of both.

    Args:
        config: of the layer.
        batch_size: sequences ``B``.
        length: tokens ``T`` of each.

    Raises:
        ValueError: if a size is not positive, or the length is over the table rows of a layer indexed by position.
    """
    return _count_flops(config, batch_size, length, forward_flops, 1)


def count_backward_flops(config: HyperConfig, batch_size: int, length: int) -> Count:
    """FLOPs of one backward, counted as :func:`count_flops` does.

    A linear map takes two products for each one of its forward; the operator, and fused softmax attention, compute
    their maps once more beside their gradients.
    """
    return _count_flops(config, batch_size, length, backward_flops, 2)


def _count_flops(
    config: HyperConfig, batch_size: int, length: int, of_pairs: Callable[..., int], products: int
) -> Count:
    """``of_pairs`` counts the operator's, and all else takes ``products`` times a forward's."""
    c = described(config)
    batch_size, length = as_sizes(batch_size=batch_size, length=length)
    if c.layout == "position" and c.mixer != "softmax" and c.max_lag is not None and length > c.max_lag:
        raise ValueError(f"length={length} is over max_lag={c.max_lag}, which the position layout does not allow")
    tokens = batch_size * length
    pairs = batch_size * visible_pairs(length, causal=c.causal, max_lag=c.max_lag)
    ranks = tuple(mix.rank if isinstance(mix, MixConfig) else 0 for mix in (c.routing_mix, c.readout_mix))

    def operator(*ranks: int) -> int:
        return of_pairs(pairs, num_heads=c.num_heads, num_maps=c.num_maps, qk=c.qk_width, v=c.v_width, ranks=ranks)

    attention = operator(0, 0)
    return Count(
        projections=products * 2 * tokens * c.hidden_size * (2 * c.qk_dim + 2 * c.v_dim),
        convolutions=products * 2 * tokens * 2 * c.hidden_size * c.conv_size,
        gates=products * 2 * tokens * c.hidden_size * sum(c.gate_widths),
        mixing=operator(*ranks) - attention,
        attention=attention,
    )


def count_block_parameters(config: HyperConfig, intermediate_size: int) -> int:
    """Parameters of a pre-norm block: the layer, a SwiGLU without biases, and two RMSNorm weights."""
    hidden = described(config).hidden_size
    intermediate_size = as_integer("intermediate_size", intermediate_size, 0)
    return count_parameters(config).total + 3 * hidden * intermediate_size + 2 * hidden


def count_block_flops(config: HyperConfig, intermediate_size: int, batch_size: int, length: int) -> int:
    """FLOPs of one forward of such a block, counted as :func:`count_flops` does; norms and activations are left out."""
    return count_flops(config, batch_size, length).total + _mlp_flops(config, intermediate_size, batch_size * length)


def count_block_backward_flops(config: HyperConfig, intermediate_size: int, batch_size: int, length: int) -> int:
    """FLOPs of one backward of such a block."""
    layer = count_backward_flops(config, batch_size, length).total
    return layer + 2 * _mlp_flops(config, intermediate_size, batch_size * length)


def _mlp_flops(config: HyperConfig, intermediate_size: int, tokens: int) -> int:
    intermediate_size = as_integer("intermediate_size", intermediate_size, 0)
    return 2 * tokens * 3 * config.hidden_size * intermediate_size


def described(config: HyperConfig, name: str = "config") -> HyperConfig:
    """``config``; TypeError for anything else, such as the layer itself."""
    check_kind(name, config, HyperConfig, "HyperConfig(hidden_size, mixer=...), or a layer's own, layer.config")
    return config


def mixings(c: HyperConfig) -> list[tuple[MixConfig, int]]:
    """Each mixing the layer has, with the number of heads it works on."""
    mixes = ((c.routing_mix, c.num_maps * c.num_heads), (c.readout_mix, c.num_heads))
    return [(mix, heads) for mix, heads in mixes if isinstance(mix, MixConfig)]
