"""The models of the study: a variant's label becomes a language model, or an autoencoder, of a given budget."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.budget import count_parameters, match_intermediate_size, match_parameters
from hypermlp.config import HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.training.recipe import parameter_count

Start = Literal["reset", "gpt", "paper"]
STARTS: tuple[Start, ...] = get_args(Start)
# the label whose layer, with an MLP of the usual width, sets the budget
REFERENCE = "S-pc"
_REFERENCE_HEADS = 4
_GPT_STD = 0.02


@dataclass(frozen=True)
class Size:
    """Of a model. ``seq_len`` is the longest sequence it reads, and the rows of its lag tables."""

    hidden_size: int
    num_layers: int
    mix_rank: int
    vocab_size: int
    seq_len: int


def layer_config(label: str, size: Size, heads: int, *, paper_conv: bool = False) -> HyperConfig:
    """The attention layer that ``label`` names, see :meth:`hypermlp.HyperConfig.from_label`.

    With ``q`` each score map of a narrow model has very few channels, 4 at width 64, where the paper's models have 8
    and more: ``h`` leaves it twice as many.
    """
    named = HyperConfig.from_label(
        label, size.hidden_size, num_heads=heads, mix_rank=size.mix_rank,
        conv_init="paper" if paper_conv else "identity",
    )  # fmt: skip
    hyper = named.mixer in ("hyperglu", "hypermlp")
    return replace(named, max_lag=size.seq_len if hyper else None)


def model_config(label: str, size: Size, heads: int, *, paper_conv: bool = False) -> LanguageModelConfig:
    """The variant's model. Its MLPs are narrowed or widened to the budget, but for a label with ``!``."""
    attention = layer_config(label, size, heads, paper_conv=paper_conv)
    baseline = layer_config(REFERENCE, size, _REFERENCE_HEADS)
    reference = LanguageModelConfig(size.vocab_size, size.hidden_size, size.num_layers, baseline)
    width = reference.intermediate_size
    if not label.endswith("!"):
        attention, width = _matched(baseline, attention, width)
    return replace(reference, attention=attention, intermediate_size=width, context_length=size.seq_len)


def _matched(reference: HyperConfig, other: HyperConfig, width: int) -> tuple[HyperConfig, int]:
    """``other`` and the MLP width of its block, as large as that of ``reference`` with ``width``.

    The MLP pays for a layer that is too large, but no more than half of its width: where that is not enough, as for a
    narrow model of long sequences, the layer gets narrower queries and keys and a lower mixing rank.
    """
    with suppress(ValueError):
        matched = match_intermediate_size(reference, other, width)
        if matched.intermediate_size is not None and 2 * matched.intermediate_size >= width:
            return other, matched.intermediate_size
    # no more than the MLP's other half can pay
    excess = 3 * other.hidden_size * (width // 2) / count_parameters(reference).total
    narrowed = match_parameters(reference, other, how="narrow", tolerance=excess).config
    matched = match_intermediate_size(reference, narrowed, width)
    assert matched.intermediate_size is not None
    return narrowed, matched.intermediate_size


def budget(label: str, size: Size, heads: int) -> str:
    """A line with the parameters of the variant's model, and of the model that sets the budget."""
    config, reference = model_config(label, size, heads), model_config(REFERENCE, size, _REFERENCE_HEADS)
    counts = [parameter_count(model) for model in (config, reference)]
    layers = [count_parameters(model.attention).total for model in (config, reference)]
    off = 100 * (counts[0] / counts[1] - 1)
    return (
        f"{label:<11} {counts[0]:,} parameters, {REFERENCE} {counts[1]:,} ({off:+.2f} %); "
        f"a layer {layers[0]:,}, {REFERENCE} {layers[1]:,}; MLP width {config.intermediate_size}"
    )


def apply_start(model: nn.Module, start: Start, num_layers: int) -> None:
    """Start the linear maps as ``start`` says; convolutions, tables and embeddings have their own start.

    ``"reset"`` leaves ``reset_parameters()``. ``"gpt"`` and ``"paper"`` draw every linear map from
    ``N(0, 0.02^2)``, those that end a residual branch ``sqrt(2 * num_layers)`` smaller (Radford et al.,
    GPT-2). In ``"paper"`` the convolutions start without the identity, too: ``conv_init="paper"``.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if start == "reset":
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ends_branch = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=_GPT_STD / ((2 * num_layers) ** 0.5 if ends_branch else 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class AutoEncoder(nn.Module):
    """MAD's model of the compression task: all tokens again from the last one's state and a position.

    Args:
        config: of the encoder, whose head is not used.

    Shape:
        int64 ``[B, T]`` to logits ``[B, T, vocab_size]``.
    """

    positions: Tensor

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.encoder = LanguageModel(config)
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.vocab_size))
        assert config.context_length is not None
        self.register_buffer("positions", _sinusoids(config.context_length, width), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        encoder = self.encoder
        x = encoder.embedding(input_ids) * encoder.config.hidden_size**0.5
        for block in encoder.blocks:
            x = block(x)
        state = encoder.norm(x[:, -1:])
        logits: Tensor = self.decoder(state + self.positions[: input_ids.shape[1]])
        return logits


def build_model(
    label: str, size: Size, heads: int, start: Start, *, autoencoder: bool = False
) -> LanguageModel | AutoEncoder:
    """The variant's model, newly started from PyTorch's own random state."""
    config = model_config(label, size, heads, paper_conv=start == "paper")
    model = AutoEncoder(config) if autoencoder else LanguageModel(config)
    apply_start(model, start, size.num_layers)
    return model


def scored_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the tokens that have a target."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _sinusoids(count: int, width: int) -> Tensor:
    """Sines and cosines of positions, ``[count, width]`` (Vaswani et al., arXiv 1706.03762, section 3.5)."""
    angle = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]
