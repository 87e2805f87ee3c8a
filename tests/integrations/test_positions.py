"""``resize_positions``: tables by position for another grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from hypermlp import HyperGLU, HyperMLP, swap_attention
from hypermlp.integrations import resize_positions
from hypermlp.integrations.positions import fit_grid
from hypermlp.layers import ReLUAttention

PREFIX = 2


def layer(rows: int = PREFIX + 12, cls: type = HyperGLU, seed: int = 0, **options: Any) -> HyperMLP:
    torch.manual_seed(seed)
    made: HyperMLP = cls(8, max_lag=rows, causal=False, mix_rank=3, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def tables(made: HyperMLP) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters() if name.endswith(("diag", "down", "up"))}


def test_the_same_grid_changes_nothing() -> None:
    made, x = layer(), torch.randn(2, 14, 8)
    before, out = tables(made), made(x)
    assert resize_positions(made, (3, 4), old_grid=(3, 4)) == 1
    assert all(torch.equal(table, before[name]) for name, table in tables(made).items())
    assert torch.equal(made(x), out)


@pytest.mark.parametrize("grid", [(6, 8), (2, 3), (5, 4), (1, 1)])
def test_shapes_prefix_and_constants(grid: tuple[int, int]) -> None:
    made = layer().double()
    with torch.no_grad():
        for table in (p for name, p in made.named_parameters() if name in tables(made)):
            table[:, PREFIX:] = table[:, PREFIX : PREFIX + 1]
    before = tables(made)
    rows = PREFIX + grid[0] * grid[1]
    resize_positions(made, grid, old_grid=(3, 4))
    assert made.config.max_lag == made.routing_mix.max_lag == made.readout_mix.max_lag == rows
    for name, table in tables(made).items():
        # what sums over positions keeps its sum, what speaks of one keeps its value
        scale = 12 / (rows - PREFIX) if name.endswith("down") else 1.0
        assert table.shape[:2] == (before[name].shape[0], rows)
        assert torch.equal(table[:, :PREFIX], before[name][:, :PREFIX])
        expected = before[name][:, PREFIX : PREFIX + 1].expand_as(table[:, PREFIX:]) * scale
        torch.testing.assert_close(table[:, PREFIX:], expected, rtol=1e-10, atol=1e-10)
    assert made(torch.randn(1, rows, 8, dtype=torch.float64)).isfinite().all()


def test_rows_and_columns_are_not_mixed_up() -> None:
    """A table that falls along the columns alone still does, along the new columns."""
    made = layer(12)
    across = torch.arange(4.0).expand(3, 4).flatten()
    with torch.no_grad():
        made.readout_mix.diag.copy_(across.expand_as(made.readout_mix.diag))
    resize_positions(made, (5, 9), old_grid=(3, 4))
    image = made.readout_mix.diag.detach().view(-1, 5, 9)
    assert (image - image[:, :1]).abs().max() < 1e-5
    assert (image.diff(dim=2) > -0.1).all()
    assert image[0, 0, 4] == pytest.approx(1.5, abs=1e-4)


def test_a_line_is_interpolated_along_itself() -> None:
    made = layer(PREFIX + 5)
    with torch.no_grad():
        made.readout_mix.diag[:, PREFIX:] = torch.arange(5.0)
    resize_positions(made, 10, prefix_tokens=PREFIX)
    expected = ((torch.arange(10) + 0.5) / 2 - 0.5).clamp(0, 4)
    torch.testing.assert_close(made.readout_mix.diag[0, PREFIX:].detach(), expected)


def smooth(side: int, channels: int, seed: int) -> Tensor:
    """The same waves ``[side * side, channels]``, seen on a grid of any size."""
    place = (torch.arange(side) + 0.5) / side
    wave = torch.randn(channels, 3, generator=torch.Generator().manual_seed(seed))
    phase = 2 * wave[:, 0, None, None] * place[:, None] + 2 * wave[:, 1, None, None] * place
    return (phase + 3 * wave[:, 2, None, None]).sin().flatten(1).T


def turned(side: int, seed: int, *, keep_down: bool = False) -> float:
    """How far what a prefix token reads of an image turns when its grid goes from 12 x 12 to ``side`` x ``side``."""
    made = layer(1 + 144, HyperMLP, seed, conv_size=0)
    with torch.no_grad():
        for place, mix in enumerate((made.routing_mix, made.readout_mix)):
            for more, table in enumerate((mix.diag, mix.down, mix.up)):
                flat = smooth(12, table[:, 0].numel(), 10 * place + more + 1)
                table[:, 1:] = flat.unflatten(1, table[:, 0].shape).movedim(1, 0) / (6 if more else 2)

        def read(size: int) -> Tensor:
            x = torch.cat((torch.ones(1, 8), smooth(size, 8, 0)))
            return made(x[None])[0, 0]

        before = read(12)
        resize_positions(made, (side, side), prefix_tokens=1)
        if keep_down:
            for mix in (made.routing_mix, made.readout_mix):
                mix.down[:, 1:] *= side * side / 144
        # its length grows with the number of tokens, as the norm has it; the direction is the image's
        return float(torch.rad2deg(torch.arccos(torch.cosine_similarity(before, read(side), dim=0).clamp(max=1))))


@pytest.mark.parametrize("side", [24, 8])
def test_the_same_image_on_another_grid_is_read_alike(side: int) -> None:
    degrees = [turned(side, seed) for seed in range(4)]
    assert sum(degrees) / 4 < 10
    # plain interpolation, which keeps all values, sums the image several times or in part
    assert sum(turned(side, seed, keep_down=True) for seed in range(4)) > 3 * sum(degrees)


def test_a_model_with_layers_of_several_kinds() -> None:
    model = nn.Sequential(layer(9), HyperMLP(8, max_lag=9), ReLUAttention(8, causal=False), layer(9, HyperMLP))
    model[1].requires_grad_(False)
    before = tables(model[1])
    model[3].routing_mix.up.requires_grad_(False)
    model.half()
    assert resize_positions(model, (4, 5)) == 2
    assert [m.config.max_lag for m in model] == [20, 9, None, 20]
    assert all(torch.equal(table, before[name].half()) for name, table in tables(model[1]).items())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not model[3].routing_mix.up.requires_grad
    assert model[3].routing_mix.down.requires_grad
    assert model.float()[0](torch.randn(1, 20, 8)).shape == (1, 20, 8)


@pytest.mark.parametrize("parts", [{"routing_mix": False}, {"readout_mix": False, "mix_rank": 0}])
def test_parts_that_are_not_there(parts: dict[str, Any]) -> None:
    made = HyperGLU(8, max_lag=9, causal=False, **parts)
    resize_positions(made, (2, 2))
    assert made(torch.randn(1, 4, 8)).isfinite().all()


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no square": (((4, 4),), {}, "14 without 0 prefix tokens, which is no square"),
    "old grid": (((4, 4),), {"old_grid": (4, 4)}, r"14 rows, which is not \(4, 4\)"),
    "prefix": (((4, 4),), {"old_grid": (3, 4), "prefix_tokens": 1}, "and 1 prefix tokens"),
    "many": ((7,), {"prefix_tokens": 14}, "prefix_tokens must be from 0 to 11"),
    "kinds": ((7,), {"old_grid": (3, 4)}, "both be lengths or both grids"),
    "zero": (((4, 0),), {}, "grid must be"),
    "three": (((4, 4, 4),), {}, "grid must be"),
    "float": ((4.0,), {}, r"grid must be a positive integer, got 4.0: \(height, width\), or a length"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_changes_nothing(case: str) -> None:
    arguments, options, message = BAD[case]
    model = nn.Sequential(layer(12), layer())
    if case in ("no square", "old grid"):
        model[0] = layer(9 if case == "no square" else 16)  # one that would do
    before = dict(model.named_parameters())
    with pytest.raises(TypeError if case == "float" else ValueError, match=message):
        resize_positions(model, *arguments, **options)
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda mix: prune.random_unstructured(mix, "down", 0.5), r"prune\.remove"),
        (lambda mix: parametrize.register_parametrization(mix, "diag", nn.Identity()), "remove_parametrizations"),
    ],
    ids=["pruned", "parametrised"],
)
def test_computed_tables_are_refused_before_anything_changes(change: Callable[[nn.Module], Any], remedy: str) -> None:
    model = nn.Sequential(layer(9), layer(9))
    change(model[1].readout_mix)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=remedy):
        resize_positions(model, (4, 4))
    assert all(p is before[name] for name, p in model.named_parameters())
    assert [made.config.max_lag for made in model] == [9, 9]


def test_a_replacement_by_itself_is_refused_before_anything_changes() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 1, enable_nested_tensor=False)
    swap_attention(model, max_lag=9)
    replacement: Any = model.layers[0].self_attn
    with pytest.raises(ValueError, match="give the model that holds it"):
        resize_positions(replacement, (4, 4))
    assert replacement.mixer.config.max_lag == replacement.mixer.routing_mix.up.shape[1] == 9
    assert resize_positions(model, (4, 4)) == 1


def test_shared_tables_are_resized_once_and_stay_shared() -> None:
    model, alone = nn.Sequential(layer(9), layer(9, seed=1)), layer(9)
    model[1].readout_mix = model[0].readout_mix
    model[1].routing_mix.down = model[0].routing_mix.down
    assert resize_positions(model, (4, 5)) == 2
    resize_positions(alone, (4, 5))
    assert model[1].readout_mix is model[0].readout_mix
    assert model[1].routing_mix.down is model[0].routing_mix.down
    resized = tables(model[0])
    assert all(torch.equal(table, resized[name]) for name, table in tables(alone).items())
    assert model(torch.randn(1, 20, 8)).isfinite().all()


def test_layers_by_lag_need_none() -> None:
    with pytest.raises(ValueError, match=r"tables by lag fit every length, and hypermlp.extend_max_lag makes"):
        resize_positions(HyperMLP(8), (4, 4))


def test_another_number_of_tokens_is_refused() -> None:
    made = layer(16)
    fit_grid(made)
    made(torch.randn(1, 16, 8))
    with pytest.raises(ValueError, match=r"16 positions and got 9 tokens.*resize_positions.*max_lag=9"):
        made(torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match=r"grid=3 is the length of a sequence, .* \(3, 3\) for 3 lines of 3"):
        resize_positions(made, 3)
    assert made.config.max_lag == 16
    resize_positions(made, (3, 3))
    made(torch.randn(1, 9, 8))
