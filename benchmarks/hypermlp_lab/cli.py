"""``hypermlp``: the command line. What it needs beyond the library is the extra ``lab``."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

_NEEDED = ("typer", "rich", "safetensors", "numpy", "filelock")


def main() -> None:
    """Entry point."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f'hypermlp: the commands need {", ".join(missing)}: in a clone, pip install -e ".[lab]"')
    build_app()()


@cache  # added to the same application again, all groups would be in it twice
def build_app() -> typer.Typer:
    """The command line with all its commands."""
    app: typer.Typer = import_module("hypermlp_lab.commands").app
    app.add_typer(import_module("hypermlp_lab.bench.command").app, name="bench")
    app.add_typer(import_module("hypermlp_lab.study.command").app, name="study")
    app.command()(import_module("hypermlp_lab.inspect.command").inspect)
    app.command()(import_module("hypermlp_lab.plan.command").plan)
    return app
