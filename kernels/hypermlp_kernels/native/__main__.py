"""``python -m hypermlp_kernels.native build``: compile now, for an image or a machine that will have no compiler."""

from __future__ import annotations

import argparse

import torch

from hypermlp_kernels.native.build import UnavailableError, build


def main() -> None:
    """Compile for float32, which every input but float64 is computed in, and say where the library is."""
    parser = argparse.ArgumentParser(prog="python -m hypermlp_kernels.native", description=main.__doc__)
    parser.add_argument("command", choices=["build"])
    parser.parse_args()
    try:
        print(build(torch.float32))
    except UnavailableError as error:
        raise SystemExit(f"not built: {error}") from error


if __name__ == "__main__":
    main()
