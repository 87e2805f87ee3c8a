#!/usr/bin/env bash
# opacus 1.6.0, torch 2.13.0: a project whose own folder `benchmarks` is imported as a namespace package.
#
# Expected: installing a library for private training adds the package `opacus` to the environment, and a project's own
# folder `benchmarks` (no __init__.py, first on the path) is imported as before.
# Seen: the wheel also installs top-level packages, `benchmarks` among them; a regular package anywhere on the path wins
# over a namespace package, so `import benchmarks.mine` fails once opacus is installed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
mkdir -p "$dir/project/benchmarks"
echo 'print("the project'"'"'s own")' > "$dir/project/benchmarks/mine.py"
cd "$dir/project"
"$dir/venv/bin/python" -c "import benchmarks.mine"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.3.5
"$dir/venv/bin/python" - <<'PY'
from importlib.metadata import files

tops = sorted({file.parts[0] for file in files("opacus") if file.suffix == ".py"})
print(f"top-level folders of the wheel: {tops}")
assert "benchmarks" in tops and "opacus" in tops
try:
    import benchmarks.mine
except ModuleNotFoundError as error:
    print(f"import benchmarks.mine: {error}")
else:
    raise AssertionError("the project's own folder was found")
PY
