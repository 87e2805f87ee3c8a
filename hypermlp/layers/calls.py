"""What a call of a layer or model may name."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

from torch import nn

from hypermlp.checks import check_names


class NamedCall(nn.Module):
    """A module whose call, given a keyword that ``forward`` has not, says which one may be meant."""

    _keywords: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._keywords = frozenset(_named(cls.forward) or ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in self._keywords:
                self._check_keywords(kwargs)
                break
        return super().__call__(*args, **kwargs)

    def _check_keywords(self, given: dict[str, Any]) -> None:
        """TypeError for what ``forward`` as it stands has not: tools put others in its place, and wrap it."""
        if self._forward_pre_hooks_with_kwargs:  # which may take what they know out
            return
        if (known := _named(self.forward)) is not None:
            check_names(type(self).__name__, given, known)


def _named(call: Callable[..., Any]) -> list[str] | None:
    """Keywords of ``call``; None where it takes any."""
    parameters = signature(call, follow_wrapped=False).parameters.values()
    if any(x.kind is Parameter.VAR_KEYWORD for x in parameters):
        return None
    return [x.name for x in parameters if x.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
