"""The choice between the two designs of the forward, and the chunks of the stored map. Plain arithmetic."""

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

from hypermlp_kernels import plan
from hypermlp_kernels.plan import Chunk, Tiles, Widths, chunks, modelled_clocks, slot_rows
from hypermlp_kernels.tiles import Precision, Tile, tiles

LIMIT = 256 * 2**20


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize(
    ("num_blocks", "per_block", "columns", "limit"), [(1, 1, 1, 2**12), (7, 3, 400, 2**16), (64, 8, 4096, 2**21)]
)
def test_chunks_cover_every_slot_once_and_keep_to_the_limit(
    num_blocks: int, per_block: int, columns: int, limit: int, grows: bool
) -> None:
    rows = 64
    found = chunks(num_blocks, per_block, rows, columns, 2, limit, grows=grows)
    assert [part.first for part in found] == [sum(part.slots for part in found[:i]) for i in range(len(found))]
    assert sum(part.slots for part in found) == num_blocks * per_block
    for part in found:
        assert part.slots >= 1
        assert part.slots * part.pitch * rows * 2 <= limit
        longest = (num_blocks - part.first // per_block) * rows
        assert part.pitch >= (min(columns, longest) if grows else columns)
        assert part.pitch % 16 == 0


def test_shorter_rows_take_larger_chunks() -> None:
    grown = chunks(64, 8, 64, 4096, 2, 2**21, grows=True)
    assert len(grown) < 0.6 * len(chunks(64, 8, 64, 4096, 2, 2**21, grows=False))


def test_a_slot_over_the_limit_leaves_nothing() -> None:
    assert chunks(4, 2, 64, 256, 2, 64 * 256 * 2, grows=True)
    assert chunks(4, 2, 64, 256, 2, 64 * 256 * 2 - 1, grows=True) == []


def test_slots_are_a_multiple_of_every_tile() -> None:
    assert slot_rows((Tile(64, 64, 0, 4, 2), Tile(16, 16, 0, 2, 1)), (Tile(128, 32, 256, 8, 3),)) == 128


def stores(
    value_width: int, *, precision: Precision = "bf16", glu: bool = True, score_width: int = 64, heads: int = 2,
    batch: int = 4, length: int = 4096, window: int | None = None, limit: int = LIMIT,
) -> bool:  # fmt: skip
    """Whether a Hopper GPU of 132 multiprocessors would be told to store the map."""
    table = {
        kernel: tiles(kernel, precision, value_width, "hopper")
        for kernel in ("selection_statistics", "readout", "stored_readout")
    }
    rows = slot_rows(table["selection_statistics"], table["stored_readout"])
    size = 2 if precision == "bf16" else 4
    columns = min(length, window or length)
    parts = chunks(-(-length // rows), batch * heads, rows, columns, size, limit, grows=True)
    if not parts:
        return False
    widths = Widths(precision, glu, score_width, value_width, 16, size)
    preferred = Tiles(*(found[0] for found in table.values()))
    return plan.stores(*modelled_clocks(widths, preferred, parts, rows, 132))


def test_more_blocks_of_values_store() -> None:
    """At the paper's score width of an eighth: one block of values makes the map again, two store it.

    Beside them a whole block of 256 is a draw.
    """
    chosen = [stores(width, score_width=width // 8) for width in (64, 128, 512, 1024)]
    assert chosen == [False, False, True, True]


def test_one_score_map_is_cheap_to_make_again() -> None:
    assert not stores(256, glu=False)
    assert stores(256)


def test_wider_scores_store() -> None:
    assert not stores(512, glu=False, score_width=16)
    assert stores(512, glu=False, score_width=512)


def test_float32_stores_wherever_values_take_blocks() -> None:
    for precision in ("tf32", "ieee"):
        for width in (256, 512):
            assert stores(width, precision=precision, glu=False)


def test_a_scratch_too_small_to_fill_the_gpu_is_not_used() -> None:
    assert stores(512, length=8192, batch=1)
    assert not stores(512, length=131072, batch=1)
    assert not stores(512, limit=2**20)
    assert not stores(512, limit=0)
    # a window makes rows short again, and so does more scratch
    assert stores(512, length=131072, batch=1, window=2048)
    assert stores(512, length=131072, batch=1, limit=64 * LIMIT)


def test_one_token() -> None:
    assert chunks(1, 1, 128, 1, 2, LIMIT, grows=True) == [Chunk(0, 1, 16)]
    assert stores(512, length=1, batch=1) in (False, True)
