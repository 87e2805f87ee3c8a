"""What a call of a layer or model may name."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any, ClassVar

from torch import nn

from hypermlp.checks import check_names


class NamedCall(nn.Module):
    """A module whose call, given a keyword that ``forward`` has not, says which one may be meant."""

    _keywords: ClassVar[tuple[str, ...] | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(signature(cls.forward).parameters.values())[1:]
        takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
        cls._keywords = None if takes_any else tuple(parameter.name for parameter in parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs and self._keywords is not None:
            check_names(type(self).__name__, kwargs, self._keywords)
        return super().__call__(*args, **kwargs)
