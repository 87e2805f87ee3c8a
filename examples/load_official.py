"""Load an attention layer that the paper's authors' code trained, and run it here.

    python examples/load_official.py
    python examples/load_official.py model.safetensors --config config.json --prefix transformer.h.0.attn.

Without arguments it takes a layer recorded from their implementation (``tests/golden``), with its input and
output, and shows that ours computes the same. Their checkpoint of a whole model holds one such layer a block:
--prefix is what the names of its parameters begin with, --config their HyperGLUConfig's fields as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hypermlp import HyperCache
from hypermlp.integrations.official import from_official

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "golden" / "s01_default_r16_Tfull.safetensors"


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a ``.safetensors`` or ``torch.save`` file, and the former's metadata."""
    if file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=True), {}
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=RECORDED)
    parser.add_argument("--config", type=Path, help="JSON; without, the checkpoint's metadata must hold it")
    parser.add_argument("--prefix", default="param.", help="what the names of the layer's parameters begin with")
    args = parser.parse_args()

    tensors, metadata = read(args.checkpoint)
    if args.config is None and "config" not in metadata:
        parser.error(f"{args.checkpoint} does not hold the authors' config: give it with --config")
    config = json.loads(args.config.read_text() if args.config else metadata["config"])
    weights = {name.removeprefix(args.prefix): x for name, x in tensors.items() if name.startswith(args.prefix)}
    if not weights:
        parser.error(
            f"nothing in {args.checkpoint} begins with {args.prefix!r}: it holds {', '.join(list(tensors)[:5])}"
        )
    layer = from_official(config, weights, layer_idx=0).eval()
    print(f"{layer}\n{sum(parameter.numel() for parameter in layer.parameters()):,} parameters")

    if "x" in tensors:
        x = tensors["x"].to(layer.q_proj.weight.dtype)
        with torch.no_grad():
            y = layer(x)
        recorded = tensors["y.f64"]
        error = (y - recorded).abs().max() / recorded.abs().max()
        print(f"recorded output {tuple(recorded.shape)}: relative difference {error:.1e}")
    else:
        x = torch.randn(1, 16, layer.config.hidden_size, dtype=layer.q_proj.weight.dtype)
        with torch.no_grad():
            y = layer(x)

    # what their code does not do: one token at a time, in bounded memory
    cache = HyperCache()
    with torch.no_grad():
        steps = torch.cat([layer(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
    print(f"token by token: relative difference {(steps - y).abs().max() / y.abs().max():.1e}, {cache}")


if __name__ == "__main__":
    main()
