#!/usr/bin/env bash
# pytorch-optimizer 4.1.0, torch 2.13.0: options of its optimizers by torch's names or misspelt, and maximize=True of
# Adan.
#
# Expected: a TypeError for an option that there is not, as torch.optim gives, whose names (decoupled_weight_decay,
# amsgrad, fused) are not this package's; and maximize=True takes the steps that the negated loss has without.
# Seen: 109 of its optimizers take any option, keep it in their groups and pass it over, silently: a weight decay that
# is misspelt is none. With maximize=True the first difference of gradients that Adan and DAdaptAdan form is twice the
# gradient, not zero: they remember it with the other sign.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pytorch-optimizer==4.1.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import pytorch_optimizer
import torch

warnings.simplefilter("ignore")


def trained(optimizer, sign=1, **options):
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(6, 4).double()), torch.randn(16, 6).double()
    optimizer = optimizer([weight], **options)
    for _ in range(5):
        optimizer.zero_grad()
        (sign * (x @ weight).square().mean()).backward()
        optimizer.step()
    return weight.detach()


def takes(optimizer, **options):
    try:
        optimizer([torch.nn.Parameter(torch.ones(4, 4))], **options)
    except Exception:
        return False
    return True


every = [pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()]
every = [optimizer for optimizer in every if takes(optimizer)]  # the others ask for more than parameters
took = [optimizer.__name__ for optimizer in every if takes(optimizer, weight_decai=0.1)]
refused = [optimizer.__name__ for optimizer in every if not takes(optimizer, weight_decai=0.1)]
print(f"weight_decai=0.1 is taken by {len(took)} optimizers and refused by {refused}")
assert len(took) > 90 and "Adam" in refused
for options in ({"decoupled_weight_decay": True}, {"amsgrad": True}, {"weight_decai": 0.1}):
    plain, other = trained(pytorch_optimizer.AdaBelief), trained(pytorch_optimizer.AdaBelief, **options)
    print(f"AdaBelief with {options}: the same steps: {torch.equal(plain, other)}")
    assert torch.equal(plain, other)

for name in ("AdaBelief", "Lion", "Adan", "DAdaptAdan"):
    optimizer = getattr(pytorch_optimizer, name)
    right, found = trained(optimizer, sign=1), trained(optimizer, sign=-1, maximize=True)
    error = ((found - right).norm() / (right - trained(optimizer, lr=0.0)).norm()).item()
    print(f"{name}: five steps of maximize=True off by {error:.2g} (relative)")
    assert (error > 0.05) if "Adan" in name else (error < 1e-8)
PY
