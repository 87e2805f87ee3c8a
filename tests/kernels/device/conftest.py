"""For tests on a GPU: an error that ends the CUDA context must not be blamed on the tests after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

CONTEXT_LOST = 70


@pytest.fixture(autouse=True)
def _context_survives() -> Iterator[None]:
    """After an illegal access every later call fails: stop this process, so that only one test is red.

    pytest-xdist starts another worker in its place and goes on with the next test.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the CUDA context is lost: {error}", file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(CONTEXT_LOST)
        pytest.exit(f"the CUDA context is lost: {error}", returncode=CONTEXT_LOST)
    torch.cuda.empty_cache()
