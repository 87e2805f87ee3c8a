"""What the checks of the backward share."""

import pytest
import torch


class Launches:
    """Notes a kernel's name when it is launched."""

    def __init__(self, name: str, kernel, names: list[str]) -> None:
        self._name, self._kernel, self._names = name, kernel, names

    def __getitem__(self, grid: tuple[int, ...]):
        self._names.append(self._name.removesuffix("_kernel"))
        return self._kernel[grid]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backward's kernels, in the order of their launches."""
    # here, because pytest reads this file where triton is not installed too
    from hypermlp_kernels import backward_pass

    names: list[str] = []
    for name, kernel in list(vars(backward_pass).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(backward_pass, name, Launches(name, kernel, names))
    return names


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel must write, scratch included, starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
