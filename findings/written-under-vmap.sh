#!/usr/bin/env bash
# torch 2.13.0: torch.func.vmap over select_scatter and grid_sample.
#
# Expected: the values and gradients of the rows one by one, as of slice_scatter, or an error.
# Seen: the gradient by the row that select_scatter writes is too large by the size of the dimension that it is written
# into, silently, where the gradient is taken of what vmap answers; vmap of the gradient is right. grid_sample with
# images and grids batched along different dimensions cuts its answer elsewhere: (N, B, ...) for (B, N, ...), with
# rows of several samples in one. (torch 2.15.0 has that right.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
import torch.nn.functional as F
from torch.func import grad, vmap

warnings.simplefilter("error")
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, row, weight = torch.randn(3, 5, 8), torch.randn(3, 8), torch.randn(3, 5, 8)
cases = {
    "slice_scatter": lambda a, b: a.slice_scatter(b[None], 0, 1, 2),
    "select_scatter": lambda a, b: a.select_scatter(b, 0, 1),
}
for name, write in cases.items():
    batched = grad(lambda b, write=write: (vmap(write)(x, b) * weight).sum())(row)
    single = vmap(grad(lambda b, a, w, write=write: (write(a, b) * w).sum()))(row, x, weight)
    looped = grad(lambda b, write=write: sum((write(*z) * w).sum() for *z, w in zip(x, b, weight, strict=True)))(row)
    ratio = (batched / looped).mean().item()
    print(f"{name}: gradient of vmap / of a loop {ratio:.4f}, vmap of the gradient {(single / looped).mean():.4f}")
    assert torch.allclose(single, looped) and torch.allclose(batched, looped * (5 if "select" in name else 1))

images, grids = torch.randn(3, 2, 4, 9, 7), torch.rand(3, 2, 5, 5, 2)
right = torch.stack([F.grid_sample(*z, align_corners=False) for z in zip(images, grids, strict=True)])
for dims in ((0, 0), (1, 1), (0, 1), (1, 0)):
    given = images.movedim(0, dims[0]), grids.movedim(0, dims[1])
    found = vmap(lambda a, b: F.grid_sample(a, b, align_corners=False), dims)(*given)
    print(f"grid_sample, batched along {dims}: {tuple(found.shape)}, a loop: {tuple(right.shape)}")
    assert torch.allclose(found.flatten(), right.flatten()) and (found.shape == right.shape) == (dims[0] == dims[1])
PY
