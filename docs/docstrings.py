"""Reads docstrings as the API page shows them: roles are links, examples are code, keywords have types and defaults.

mkdocstrings loads it (``mkdocs.yml``). The docstrings themselves stay as editors and ``help()`` show them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# whose fields give the keywords of HyperFields their defaults
_DEFAULTS = "hypermlp.config.HyperConfig"
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(?P<short>~?)(?P<name>[\w.]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Called by griffe for every object, once its package is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of ``obj``, and its signature where keywords come from a TypedDict."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(lambda role: link(obj, role["name"], short=bool(role["short"])), obj.docstring.value)
        obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)
        if isinstance(obj, griffe.Function):
            name_keywords(obj)
        if isinstance(obj, griffe.Function | griffe.Class):
            split_entries(obj)


def link(obj: griffe.Object, name: str, *, short: bool) -> str:
    """``name`` in the scope of ``obj`` as a link; as code where it is nothing that the API page shows."""
    shown = name.rpartition(".")[2] if short else name
    try:
        path = resolve(obj, name)
    except griffe.NameResolutionError:
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def resolve(obj: griffe.Object, name: str) -> str:
    """The full name of what ``obj`` calls ``name``."""
    first, _, rest = name.partition(".")
    if first in obj.modules_collection:
        return name
    scope = obj if isinstance(obj, griffe.Class) else obj.parent
    if isinstance(scope, griffe.Class) and first in scope.all_members:
        path = scope.all_members[first].canonical_path
    else:
        path = obj.resolve(first)
    return f"{path}.{rest}" if rest else path


def name_keywords(function: griffe.Function) -> None:
    """``**fields: Unpack[...]`` becomes the keywords that it stands for."""
    fields = next((p for p in function.parameters if p.kind is griffe.ParameterKind.var_keyword), None)
    if fields is None or not str(fields.annotation).startswith("Unpack["):
        return
    keywords = function.modules_collection[function.resolve(fields.annotation.slice.name)]
    defaults = function.modules_collection[_DEFAULTS].attributes
    del function.parameters[fields.name]
    for name, field in keywords.attributes.items():
        kind, default = griffe.ParameterKind.keyword_only, defaults[name].value
        function.parameters.add(griffe.Parameter(name, annotation=field.annotation, kind=kind, default=default))


def split_entries(obj: griffe.Function | griffe.Class) -> None:
    """An entry for several arguments becomes one for each, with its type and default."""
    for section in obj.docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.parameters:
            section.value = [one for entry in section.value for one in entries(obj.parameters, entry)]


def entries(known: griffe.Parameters, entry: griffe.DocstringParameter) -> list[griffe.DocstringParameter]:
    """``entry`` for each of the arguments that it names."""
    found = []
    for name in entry.name.split(", "):
        one = next((parameter for parameter in known if parameter.name == name), entry)
        annotation, value = one.annotation, one.default
        found.append(griffe.DocstringParameter(name, annotation=annotation, description=entry.description, value=value))
    return found
