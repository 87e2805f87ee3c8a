"""Tuned tiles: what is timed, what is kept, under which key. With a timer that is told the answer: no GPU here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

import report_forward
import triton
from virtual_gpu import virtual_gpu

from hypermlp_kernels import autotune, launch
from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.autotune import TUNED, Tuned
from hypermlp_kernels.call import Call, candidates
from hypermlp_kernels.tiles import Tile

SLOW, FAST, LARGE = Tile(64, 64, 0, 4, 2), Tile(32, 32, 0, 4, 2), Tile(128, 64, 0, 8, 2)
TIMES = {SLOW: 2.0, FAST: 1.0}


class Device:
    """Launches are recorded; a large tile does not fit."""

    def __init__(self) -> None:
        self.launched: list[Tile] = []

    def launch(self, tile: Tile) -> None:
        if tile == LARGE:
            raise triton.OutOfResources(200_000, 100_000, "shared memory")
        self.launched.append(tile)

    def timer(self, launch: Callable[[], None]) -> float:
        launch()
        return TIMES[self.launched[-1]]


def test_the_fastest_that_fits_is_kept_and_timed_once() -> None:
    tuned, device = Tuned(), Device()
    assert tuned.get("key") is None
    assert tuned.search("key", (LARGE, SLOW, FAST), device.launch, device.timer) == FAST
    assert device.launched == [SLOW, FAST]
    assert tuned.search("key", (SLOW,), device.launch, device.timer) == tuned.get("key") == FAST
    assert device.launched == [SLOW, FAST]
    assert tuned.search("another key", (SLOW,), device.launch, device.timer) == SLOW


def test_nothing_that_fits_is_an_error() -> None:
    tuned, device = Tuned(), Device()
    with pytest.raises(ValueError, match="shared memory: key"):
        tuned.search("key", (LARGE,), device.launch, device.timer)
    assert tuned.get("key") is None


def test_a_file_keeps_what_was_found(tmp_path: Path) -> None:
    tuned, device, other = Tuned(), Device(), Tuned()
    tuned.search("key", (FAST, SLOW), device.launch, device.timer)
    tuned.save(tmp_path / "tiles.json")
    other.load(tmp_path / "tiles.json")
    assert other.get("key") == FAST
    assert isinstance(other.get("key"), Tile)
    other.clear()
    assert other.get("key") is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"key": 3}', '{"key": [64, 64]}', '{"key": [48, 16, 0, 4, 2]}', '{"key": [32, 64, 0, 4, 2]}']
)
def test_a_file_that_is_none_is_refused_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "tiles.json").write_text(text)
    tuned = Tuned()
    with pytest.raises(ValueError, match="not a file of tiles"):
        tuned.load(tmp_path / "tiles.json")
    assert tuned.get("key") is None


OPTIONS = Options("glu", True, 1e-12, True, "lag", None)


def call(length: int = 8, **changes: object) -> Call:
    q, v = torch.zeros(1, length, 2, 16), torch.zeros(1, length, 1, 32)
    bare = SequenceMix(None, None, None, None, True)
    made = Call(
        q, q, v, bare, bare, q, q, q, OPTIONS, precision="ieee", attention_mask=None, sequences=None, chosen=None,
    )  # fmt: skip
    return made._replace(**changes)


@pytest.fixture
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    target = SimpleNamespace(backend="cuda", arch=90)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: target))


@pytest.mark.usefixtures("_one_gpu")
def test_the_key_holds_what_is_compiled_and_never_the_length() -> None:
    keys = {call(length).key("readout") for length in (1, 8, 1000)}
    assert len(keys) == 1
    others = [
        call().key("selection_statistics"),
        call(options=OPTIONS._replace(selection="relu")).key("readout"),
        call(options=OPTIONS._replace(norm=False)).key("readout"),
        call(options=OPTIONS._replace(layout="position")).key("readout"),
        call(precision="tf32").key("readout"),
        call(design="store").key("readout"),
        call(v=torch.zeros(1, 8, 1, 64)).key("readout"),
        call(attention_mask=torch.ones(1, 8, dtype=torch.bool)).key("readout"),
        call(readout=SequenceMix(torch.zeros(1, 8), None, None, None, True)).key("readout"),
    ]
    assert len({*keys, *others}) == 1 + len(others)


@pytest.mark.usefixtures("_one_gpu")
@pytest.mark.skipif(launch.interpreted(), reason="the interpreter has one tile")
def test_later_launches_take_what_was_found() -> None:
    table = candidates("stored_readout", call())
    TUNED.search(call().key("stored_readout"), (table[-1],), lambda tile: None, lambda launch: 1.0)
    try:
        assert candidates("stored_readout", call(1000)) == (table[-1], *table[:-1])
        assert candidates("stored_readout", call(chosen={"stored_readout": FAST})) == (FAST,)
    finally:
        TUNED.clear()


@pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("within", [False, True], ids=["argument", "searching"])
def test_asking_times_every_candidate(monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    """Through the real launch code for a GPU that is not here, whose last tile is the fastest."""
    timed = iter(range(100, 0, -1))

    def timer(run: Callable[[], None]) -> float:
        run()
        return next(timed)

    monkeypatch.setattr(autotune.Tuned.search, "__defaults__", (timer,))
    small = {"width": 16, "values": 16, "rank": 1, "dtype": torch.float32, "design": "store"}
    try:
        with virtual_gpu("sm_90") as gpu:
            if within:
                with TUNED.searching():
                    report_forward.call(17, **small)
            else:
                report_forward.call(17, **small, autotune=True)
            assert not TUNED.wanted
            searched = len(gpu.launches)
            report_forward.call(48, **small)
            assert len(gpu.launches) == searched + 4  # three kernels, and the norms of extreme rows
        assert searched > 6
        with virtual_gpu("sm_90") as gpu:
            report_forward.call(17, **small)
            assert {compiled.metadata.num_warps for compiled in gpu.compiled()} == {2}
    finally:
        TUNED.clear()
