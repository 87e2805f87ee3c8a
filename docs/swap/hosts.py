"""Writes hosts.md beside it: what is proven of every host, by running it. Takes two minutes.

python docs/swap/hosts.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

from tests.integrations.huggingface import checks, proofs
from tests.integrations.huggingface.families import HOSTS

# made by tests of their own, tests/integrations/test_other_libraries.py, test_monai.py and others, with these versions
OTHERS = """
| library | version | classes | proven | `from_attention` | stays, or is refused |
| --- | --- | --- | --- | --- | --- |
| PyTorch | {torch} | `torch.nn.modules.activation.MultiheadAttention` in `self_...` | values, masks, modes, weights | yes, except with `add_bias_kv` or `add_zero_attn` | cross-attention; one that may read another sequence |
| timm | 1.0.31 | `timm.layers.attention.Attention`, `timm.models.vision_transformer.Attention` | values, sizes, building, FX | yes, except with norms or gates within | other attention (Swin, EVA, relative positions) |
| vit-pytorch | 1.26.14 | `vit_pytorch.vit.Attention`, `vit_pytorch.simple_vit.Attention` | values, the norm within, weights, training | yes | other files of that library: register the adapter for their class |
| open_clip | 3.3.0 | `open_clip.transformer.Attention`, and `nn.MultiheadAttention` in its blocks | values of pictures and text, masks | yes, except with norms or scales within | poolers and other cross-attention |
| x-transformers | 2.31.10 | `x_transformers.x_transformers.Attention` | values, padding, generation | refused: its options change scores and values | cross-attention; `add_value_residual`, `residual_attn`; its cache of keys and values, so generation runs the whole prefix |
| MONAI | 1.6.1 | `monai.networks.blocks.selfattention.SABlock` | values, causal decoders, padding, weights, training | yes, except with `rel_pos_embedding` | cross-attention; the encoder of `MaskedAutoEncoderViT`, which sees patches in random order; `attn_mask` of causal or flash attention |
| nanoGPT, minGPT | copied | `CausalSelfAttention` with `c_attn` and `c_proj` | values, training, cropping | yes | other classes of that name |
"""  # noqa: E501

HEAD = """# Hosts

Made by `python docs/swap/hosts.py`, which runs every line with a tiny model of random weights, in float64 on a CPU: transformers
{transformers}, PyTorch {torch}. The same checks are tests (`tests/integrations/huggingface/test_families.py`).

| column | what was compared |
| --- | --- |
| values | the swapped model and the host with a separate layer of the reference path called in each place |
| cache | token by token and all at once; greedy generation with and without a cache |
| padding | rows with garbage under the mask, left and right of decoders, and each row alone; Wav2Vec2 and HuBERT with `feat_extract_norm="layer"`: with `"group"` their own front end reads the padding |
| packed | documents in one row, told apart by `position_ids`, and each alone |
| saved | `save_pretrained`, then `hypermlp.integrations.huggingface.from_pretrained`: the same weights to the bit |
| `from_attention` | a softmax layer started from the host's projections, and the host itself. "Without its angles": a hyper layer has no partial, scaled or two-dimensional rotation, so it starts without, and is compared with the host so |
| `-` | nothing to compare: encoders, pictures and sound have no cache, pictures and Whisper's sound no padding, and no host of these nor an encoder-decoder tells documents apart by `position_ids` (encoders: by a block-diagonal mask) |
| the host has none | the host itself reads such a row as one text, and so does the swapped model: give each document a row |

Classes are found by where they were written (`transformers.models.llama.modeling_llama.LlamaAttention`), so another library's class of
the same name is not taken for one. A subclass counts as its class unless it has a `forward` of its own.

| host | class | values | cache | padding | packed | saved | `from_attention` |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""  # noqa: E501

TAIL = """
Of all of them:

- Sliding windows become `max_lag` of that layer; a window on both sides (ModernBERT's local layers, bidirectional Gemma 3) stays the host's.
- A decoder that its config makes bidirectional (`is_causal=False`, `use_bidirectional_attention=True`) gets bidirectional layers; GPT-Neo has a
  triangle of its own and stays causal.
- Cross-attention stays the host's, and the report says so.
- T5's first layer has the position biases of its whole stack: replace all layers of a stack, or leave the first.
- Normalised queries and keys, capped scores, ALiBi and relative position biases have no counterpart; `init="fresh"` does without, and the
  report of the swap says so. MPNet's table of them stays in its encoder, with no gradient where all layers are replaced.
- ALBERT has one attention for many layers, and so one hyper layer. Its attention adds the residual and normalises the sum itself: both stay, as
  does the residual that Bloom's adds.
- A length that the model does not tell (Wav2Vec2, HuBERT, T5, a Bloom whose config has no `seq_length`, MONAI outside of
  vision transformers and decoders, `nn.TransformerEncoder` without learned positions) is asked for: `max_lag=`.

## Other libraries
"""  # noqa: E501


def main() -> None:
    checks.quiet()
    transformers.utils.logging.set_verbosity_error()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    lines = [_line(name) for name in HOSTS]
    text = HEAD.format(**versions) + "".join(lines) + TAIL + OTHERS.format(**versions)
    (Path(__file__).parent / "hosts.md").write_text(text)


def _line(name: str) -> str:
    """A host's row; an error where something does not hold, so that the page cannot say what is not so."""
    kind = HOSTS[name].kind
    classes = sorted({entry.was for entry in proofs.find_sites(proofs.stock(name))[0]})
    proofs.check_values(name)
    cache = padding = packed = "-"
    if kind in ("decoder", "pair"):
        proofs.check_cache(name)
        cache = "yes"
    if kind in ("decoder", "encoder", "pair", "sound") and name != "whisper":
        proofs.check_padding(name)
        padding = "yes"
    if kind == "decoder":
        packed = proofs.check_packed(name)
    with tempfile.TemporaryDirectory() as folder:
        proofs.check_saved(name, Path(folder))
    start = proofs.check_from_attention(name)
    shown = ", ".join(f"`{one}`" for one in classes)
    return f"| {name} | {shown} | yes | {cache} | {padding} | {packed} | yes | {start} |\n"


if __name__ == "__main__":
    main()
