"""Generation: prompts continued token by token, with a cache."""

from hypermlp.generation.loop import generate, stream
from hypermlp.generation.sampling import apply_repetition_penalty, apply_temperature, apply_top_k, apply_top_p, sample

__all__ = [
    "apply_repetition_penalty",
    "apply_temperature",
    "apply_top_k",
    "apply_top_p",
    "generate",
    "sample",
    "stream",
]
