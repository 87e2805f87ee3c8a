"""Tiny host models of transformers, with weights large enough that a mistake shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hypermlp import swap_attention

VOCAB = 67
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # generate() is told to go on past the end


def _model(model: str, config: str, **fields: Any) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        made = getattr(transformers, config)(**(_SIZES | _TOKENS | fields | options))
        # as from_pretrained does it
        built: nn.Module = getattr(transformers, model)(made)
        return built

    return build


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BUILD: dict[str, Callable[..., nn.Module]] = {
    "gpt2": _model("GPT2LMHeadModel", "GPT2Config", **_NO_DROPOUT),
    "llama": _model("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2),
    "mistral": _model("MistralForCausalLM", "MistralConfig", num_key_value_heads=2, sliding_window=6),
    "qwen2": _model(
        "Qwen2ForCausalLM", "Qwen2Config",
        num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1,
    ),
    "qwen3": _model("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8),
    "gpt_neox": _model("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "bert": _model("BertForMaskedLM", "BertConfig", **_BERT),
    "bert_decoder": _model("BertLMHeadModel", "BertConfig", is_decoder=True, **_BERT),
}  # fmt: skip
DECODERS = [name for name in BUILD if name != "bert"]
# one for each way of calling attention; the others are called as llama is
FOUR = ["gpt2", "llama", "qwen3", "gpt_neox"]


def stock(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """An unchanged host in evaluation mode, its weights random, in float64: rounding differs between machines."""
    torch.manual_seed(seed)
    model = BUILD[name](**options).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Random weights in float64; sinusoids, which are not trained, stay."""
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.double()  # not the buffers: angles are float32 in every model
        if parameter.ndim == 1 and "bias" not in key:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.2)


def swapped(
    name: str, *, seed: int = 0, attn: str = "sdpa", mixer: str = "hyperglu", num_hidden_layers: int = 2, **options: Any
) -> nn.Module:
    """The same with hyper layers."""
    model = stock(name, seed, attn_implementation=attn, num_hidden_layers=num_hidden_layers)
    swap_attention(model, mixer, **options)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids, **kwargs).logits
    return out


def cache_of(model: Any, *, static: int | None = None) -> Any:
    """A cache as ``generate`` makes it."""
    config = model.config
    if static is not None:
        return transformers.StaticCache(config=config, max_cache_len=static)
    return transformers.DynamicCache(config=config)
