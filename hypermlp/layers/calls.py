"""What a call of a layer or model may name."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import nn

from hypermlp.checks import check_names


class NamedCall(nn.Module):
    """A module whose call, given a keyword that ``forward`` has not, says which one may be meant."""

    # of forward as the class has it; None for any
    _keywords: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._keywords = _named(cls.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._keywords is not None:
            for name in kwargs:
                if name not in self._keywords:
                    self._check_keywords(kwargs)
                    break
        return super().__call__(*args, **kwargs)

    def _check_keywords(self, given: dict[str, Any]) -> None:
        """TypeError for what ``forward`` as it stands has not: tools put others in its place, and wrap it."""
        # hooks may take what they know out, and compiled code does not look at signatures
        if self._forward_pre_hooks_with_kwargs or torch.compiler.is_compiling():
            return
        if (known := _named(self.forward)) is not None:
            check_names(type(self).__name__, given, known)


def _named(call: Callable[..., Any]) -> tuple[str, ...] | None:
    """Keywords of ``call``; None where it takes any."""
    parameters = signature(call, follow_wrapped=False).parameters.values()
    if any(x.kind is Parameter.VAR_KEYWORD for x in parameters):
        return None
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return tuple(x.name for x in parameters if x.kind in named)
