"""Chunks of rows in the backward, and which of them split their rows along keys. Plain arithmetic."""

import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

from hypermlp_kernels import backward_plan
from hypermlp_kernels.backward_plan import Chunk, Plan, Sizes, Split
from hypermlp_kernels.backward_tiles import BackwardTile

LIMIT = 512 * 2**20
NEVER, ALWAYS = 0, sys.maxsize
# blocks, heads, growing ones, most tiles, tiles that a growing block has more than the last
SHAPES = [(7, 3, 2, 5, 2), (7, 3, 5, 5, 1), (4, 2, 0, 6, 2), (1, 1, 0, 1, 1)]


@pytest.mark.parametrize("limit", [1, 2, 5, 17, 100, 10_000])
@pytest.mark.parametrize("split", [Split(1, NEVER), Split(1, ALWAYS), Split(2, ALWAYS), Split(2, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_cover_every_block_once_and_keep_to_the_limit(shape: tuple[int, ...], split: Split, limit: int) -> None:
    plan, sizes = Plan(*shape), Sizes(3, 2)
    chunks = list(plan.chunks(limit, sizes, split))
    assert [c.stop for c in chunks] == [plan.num_blocks * plan.heads, *(c.first for c in chunks[:-1])]
    assert chunks[-1].first == 0
    for chunk in chunks:
        own = [plan.tiles_before(b + 1) - plan.tiles_before(b) for b in range(chunk.first, chunk.stop)]
        assert chunk.tiles == sum(own)
        assert chunk.origin == plan.tiles_before(chunk.first)
        needed = sum(own) * 3 + (chunk.blocks * chunk.parts * 2 if chunk.parts > 1 else 0)
        assert sizes.of(chunk) == needed
        assert needed <= limit or chunk.blocks == 1
        longest = max(own)
        assert (chunk.parts - 1) * chunk.span < longest <= chunk.parts * chunk.span
        assert chunk.parts == 1 or split.programs != NEVER
        assert chunk.span <= split.span or split.programs != ALWAYS


def plan_of(batch: int, length: int, window: int | None = None) -> Plan:
    """Of two heads, in blocks of 128 rows and tiles of 64 keys."""
    most = min(-(-length // 64), 2 + -(-((window or length) - 1) // 64))
    return Plan(-(-length // 128), 2 * batch, most // 2, most, 2)


def chunks(plan: Plan) -> list[Chunk]:
    """As HyperGLU in bfloat16 makes them of 512 MB on a Hopper GPU of 132 multiprocessors, with scores 64 wide."""
    sizes = Sizes(128 * 64 * 2 * 4, 128 * 2 * 64 * 4)
    found = list(plan.chunks(LIMIT, sizes, Split(16, 132)))
    assert all(sizes.of(chunk) <= LIMIT for chunk in found)
    return found


def test_few_long_rows_are_split() -> None:
    assert [(c.blocks, c.parts, c.span) for c in chunks(plan_of(1, 32768))[:2]] == [(15, 18, 29), (16, 18, 28)]
    assert [(c.parts, c.span) for c in chunks(plan_of(1, 4096))] == [(4, 16)]


def test_many_rows_or_short_ones_are_not() -> None:
    for batch, length, window in (
        (16, 1024, None),
        (4, 4096, None),
        (1, 1024, None),
        (4, 2048, 1024),
        (1, 32768, 4096),
    ):
        assert {c.parts for c in chunks(plan_of(batch, length, window))} == {1}


@pytest.mark.parametrize("length", [2048, 3000, 4096, 8192, 16384, 32768])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_no_program_takes_much_longer_than_its_share(batch: int, length: int) -> None:
    """Or it has no more than 1024 keys."""
    for chunk in chunks(plan_of(batch, length)):
        assert chunk.span <= max(16, 1.5 * chunk.tiles / 132)


def test_a_span_may_be_asked_for() -> None:
    tile = BackwardTile(32, 32, 64, 32, 64, 4, 2)
    assert Split.of(tile, 3).parts(7, 1000) == 3
    assert Split.of(tile, 3).parts(3, 1000) == 1


def test_the_rule_counts_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_plan, "multiprocessors", lambda: 132)
    for keys in (16, 32, 64):
        assert Split.of(BackwardTile(64, keys, 64, 32, 64, 4, 2), None).parts(4096 // keys, 1) == 4
