"""Hyper layers in models of transformers; skipped where it is not installed."""

import pytest

pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra: transformers >= 5.5")
