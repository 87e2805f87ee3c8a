#!/usr/bin/env bash
# lycoris-lora 4.1.3, torch 2.13.0: adapters with use_scalar=True, with bypass_mode=True or on a convolution with
# another padding_mode than zeros, merged by merge_to; a DyLoRA, asked twice and opened again from its own state_dict.
#
# Expected: merging and opening do not change the function, as for LoCon; in evaluation an adapter answers one thing.
# Seen: other functions, silently. LoHa and LoKr are merged without their scalar, so even an untrained one, whose scalar
# is zero, changes the model; OFT with bypass_mode rotates the outputs with their bias, merged without; the adapter's
# own convolution pads with zeros. A DyLoRA draws a rank for each call in evaluation, too, and has a scale for each
# block of its rank that its saved form has for each column: opened again it counts a quarter.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lycoris-lora==4.1.3 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights

LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Linear", "Conv1d"]})
ranks = {"linear_dim": 4, "linear_alpha": 4, "conv_dim": 4, "conv_alpha": 4}
circular = {"padding": 1, "padding_mode": "circular"}
torch.manual_seed(0)
vectors, texts = torch.randn(3, 8), torch.randn(3, 8, 9)
linear, convolution = (lambda: nn.Linear(8, 12), vectors), (lambda: nn.Conv1d(8, 12, 3, padding=1), texts)
cases = [
    ("lora", {"use_scalar": True}, *linear, True),
    ("loha", {}, *linear, True),
    ("loha", {"use_scalar": True}, *linear, False),
    ("lokr", {}, *linear, True),
    ("lokr", {"use_scalar": True}, *linear, False),
    ("diag-oft", {}, *linear, True),
    ("diag-oft", {"bypass_mode": True}, *linear, False),
    ("lora", {}, *convolution, True),
    ("lora", {}, lambda: nn.Conv1d(8, 12, 3, **circular), texts, False),
    ("dylora", {}, *linear, True),
]


def adapted(algorithm, options, layer, trained=True, **more):
    torch.manual_seed(0)
    model = nn.Sequential(layer()).eval()
    adapter = create_lycoris(model, 1.0, algo=algorithm, **{**ranks, **more}, **options).eval()
    adapter.apply_to()
    for parameter in adapter.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter) if trained else 0)
    return model, adapter


with torch.no_grad():
    for algorithm, options, layer, x, right in cases:
        for trained in (False, True):
            model, adapter = adapted(algorithm, options, layer, trained)
            before = model(x)
            adapter.restore()
            adapter.merge_to(1.0)
            change = ((model(x) - before).norm() / before.norm()).item()
            print(
                f"{algorithm} {options} on {model[0]}, {'' if trained else 'un'}trained: "
                f"merging changes it by {change:.2g}"
            )
            assert (change < 1e-5) if right or (not trained and "use_scalar" not in options) else (change > 0.02)
    layer, x = linear
    plain = adapted("lora", {}, layer, trained=False)[0](x)
    for algorithm in ("lora", "dylora"):
        model, adapter = adapted(algorithm, {}, layer)
        effect = model(x) - plain
        torch.manual_seed(0)
        again = nn.Sequential(layer()).eval()
        opened, _ = create_lycoris_from_weights(1.0, None, again, adapter.state_dict())
        opened.eval().apply_to()
        share = ((again(x) - plain).norm() / effect.norm()).item()
        model, adapter = adapted(algorithm, {}, layer, linear_dim=16)
        answers = {tuple(model(x).flatten().tolist()) for _ in range(20)}
        print(
            f"{algorithm}: opened again it has {share:.2g} of its effect; "
            f"rank 16 gives {len(answers)} answers in 20 calls"
        )
        assert (
            (abs(share - 1) < 1e-4 and len(answers) == 1) if algorithm == "lora" else (share < 0.3 and len(answers) > 1)
        )
PY
