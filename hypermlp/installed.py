"""Which packages are installed, and what is missing of the extras."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

from torch.torch_version import TorchVersion

# those that users need; the others are for work on the library itself
_EXTRAS = {"lab": "the hypermlp command", "hf": "transformers' models"}


def installed(package: str) -> str:
    """The version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def missing_extras() -> str:
    """What is missing of the extras that users need, and the command that installs it."""
    try:
        required = requires("hypermlp") or []
    except PackageNotFoundError:
        return "unknown, for hypermlp is imported from a folder and not installed: in a clone, pip install -e ."
    missing: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    for requirement in required:
        need, _, condition = requirement.partition(";")
        extra = re.search(r"extra *== *['\"](\w+)['\"]", condition)
        if extra and extra[1] in missing and (lacking := _lacking(need.strip())):
            missing[extra[1]].append(lacking)
    if not any(missing.values()):
        return f"{', '.join(missing)}: all there"
    lacks = [f"{extra} ({_EXTRAS[extra]}) lacks {', '.join(needs)}" for extra, needs in missing.items() if needs]
    names = ",".join(extra for extra, needs in missing.items() if needs)
    return f"{'; '.join(lacks)}: in a clone, pip install -e '.[{names}]'"


def _lacking(need: str) -> str:
    """``need`` with what there is instead, if there is nothing, or an older one than ``NAME>=VERSION`` says; else "".

    Older as pip has it: a release candidate of a version comes before it.
    """
    found = re.match(r"([\w.-]+)(?:\[[^]]*\])? *(?:>= *([\d.]+))?", need)
    there = installed(found[1]) if found else "none"
    if there == "none":
        return need
    return "" if found and TorchVersion(there) >= TorchVersion(found[2] or "0") else f"{need} ({there} is older)"
