"""The interpreter with its repairs refuses what it refuses without them."""

from __future__ import annotations

import pytest
import repairs
import triton.language as tl

repairs.repair()


def test_a_kept_type_hides_no_size_of_another_kind() -> None:
    """16.0 is equal to 16, and no size of a tile."""
    assert tl.block_type(tl.float32, [16, 8]).shape == (16, 8)
    for sizes in ([16.0, 8], [16, tl.constexpr(8.0)]):
        with pytest.raises(TypeError):
            tl.block_type(tl.float32, sizes)
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [12, 8])


def test_a_kept_type_is_of_its_own_element() -> None:
    elements = [tl.float32, tl.bfloat16, tl.int32, tl.pointer_type(tl.float32), tl.pointer_type(tl.bfloat16)]
    for _ in range(2):
        for element in elements:
            made = tl.block_type(element, [16, 8])
            assert (made.scalar, made.numel) == (element, 128)
            assert [other for other in elements if made == tl.block_type(other, [16, 8])] == [element]
