#!/usr/bin/env bash
# vector-quantize-pytorch 1.32.0, torch 2.13.0: VectorQuantize of texts with a mask, in training, and with
# affine_param=True in evaluation.
#
# Expected: with a mask the loss of the tokens alone, as by default; and in evaluation the same codes for the same
# input.
# Seen: with a mask the codes are compared with the input as it came, not as it was quantised: unit vectors with
# unscaled ones for use_cosine_sim=True, and each head's with the whole input for separate codebooks, silently (shared
# heads end in a size error). The diversity loss counts padding. affine_param moves its statistics in evaluation, too:
# an answer depends on what was asked before and on the rest of the batch.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vector-quantize-pytorch==1.32.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # of the packages that it imports
from vector_quantize_pytorch import VectorQuantize

torch.manual_seed(0)
texts, mask = torch.randn(2, 12, 16), torch.arange(12) < torch.tensor([[7], [12]])
other = torch.where(mask[..., None], texts, 5 * torch.randn(2, 12, 16))


def loss(x, **options):
    torch.manual_seed(0)
    quantiser = VectorQuantize(dim=16, codebook_size=32, **options.pop("init", {})).train()
    return quantiser(x, **options)[2].item()


for options, right in (
    ({}, True),
    ({"use_cosine_sim": True}, False),
    ({"heads": 2, "separate_codebook_per_head": True}, False),
    ({"codebook_diversity_loss_weight": 0.1}, False),
):
    alone = loss(texts[mask][None], init=options)
    masked, padded = (loss(x, mask=mask, init=options) for x in (texts, other))
    print(f"{options}: loss of the tokens alone {alone:.4f}, by a mask {masked:.4f}, beside other padding {padded:.4f}")
    assert (abs(masked - alone) < 1e-5) if right else (abs(masked - alone) > 0.01 * alone)
    assert (abs(padded - masked) > 1e-4) == ("codebook_diversity_loss_weight" in options)

for options in ({}, {"affine_param": True}):
    torch.manual_seed(0)
    quantiser = VectorQuantize(dim=16, codebook_size=32, **options)
    for _ in range(5):
        quantiser(torch.randn(2, 64, 16))
    quantiser.eval()
    with torch.no_grad():
        first = quantiser(texts)[0]
        quantiser(3 * torch.randn(8, 64, 16) + 1)
        again = quantiser(texts)[0]
    change = ((again - first).norm() / first.norm()).item()
    print(
        f"{options}, evaluation: the same input, asked again after another one, has answers that differ by {change:.2g}"
    )
    assert (change > 1e-3) if options else (change == 0)
PY
