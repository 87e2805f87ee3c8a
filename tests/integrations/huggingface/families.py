"""A tiny model of every transformers host that has an adapter, made from its config: nothing is downloaded."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from tests.integrations.huggingface.hosts import randomize

Kind = Literal["decoder", "encoder", "picture", "sound", "pair"]

VOCAB = 67
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_FEW = {**_TEXT, "num_key_value_heads": 2}
_GROUPS = {**_FEW, "head_dim": 8}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
_GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **_TOKENS}
_NO_PDROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BERT = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PICTURE = {
    "image_size": 12, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_channels": 3,
}  # fmt: skip
_PAIR = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, **_TOKENS,
}  # fmt: skip
_SPEECH = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "mask_time_prob": 0.0, "final_dropout": 0.0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class Case(NamedTuple):
    """One host.

    Attributes:
        kind: what the model reads and does.
        model: class of transformers.
        config: its config's class.
        fields: of the config.
    """

    kind: Kind
    model: str
    config: str
    fields: dict[str, Any]


def _decoder(name: str, fields: dict[str, Any]) -> Case:
    return Case("decoder", f"{name}ForCausalLM", f"{name}Config", fields)


def _encoder(name: str, fields: dict[str, Any]) -> Case:
    return Case("encoder", f"{name}ForMaskedLM", f"{name}Config", fields)


def _pair(name: str, fields: dict[str, Any]) -> Case:
    return Case("pair", f"{name}ForConditionalGeneration", f"{name}Config", fields)


_GPT_NEO = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]], "window_size": 6, "intermediate_size": 48,
    "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, **_TOKENS,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, **_TOKENS,
}  # fmt: skip
_WHISPER = {
    **{key: value for key, value in _PAIR.items() if key != "max_position_embeddings"},
    "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_ESM = {"mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False}
_SHARED = {"embedding_size": 16, "num_hidden_layers": 3}
_MODERN = {"layer_types": ["full_attention", "full_attention"], "cls_token_id": 1, "sep_token_id": 2}

HOSTS: dict[str, Case] = {
    # separate or joint projections, rotary angles
    "llama": _decoder("Llama", _GROUPS),
    "mistral": _decoder("Mistral", {**_GROUPS, "sliding_window": 6}),
    "mixtral": _decoder("Mixtral", {**_GROUPS, **_EXPERTS}),
    "qwen2": _decoder("Qwen2", _FEW),
    "qwen2_moe": _decoder("Qwen2Moe", {**_FEW, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": _decoder("Qwen3", _GROUPS),
    "qwen3_moe": _decoder("Qwen3Moe", {**_GROUPS, **_EXPERTS}),
    "gemma": _decoder("Gemma", _GROUPS),
    "gemma2": _decoder("Gemma2", {**_GROUPS, **_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": Case(
        "decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPS, **_SLIDING, "query_pre_attn_scalar": 8}
    ),
    "phi": _decoder("Phi", _FEW),
    "phi3": _decoder("Phi3", {**_FEW, "original_max_position_embeddings": 64}),
    "phimoe": _decoder("Phimoe", {**_FEW, **_EXPERTS}),
    "olmo": _decoder("Olmo", _FEW),
    "olmo2": _decoder("Olmo2", _FEW),
    "olmo3": _decoder("Olmo3", {**_FEW, **_SLIDING}),
    "smollm3": _decoder("SmolLM3", {**_FEW, "no_rope_layers": [1, 0]}),
    "granite": _decoder("Granite", _FEW),
    "granitemoe": _decoder("GraniteMoe", {**_FEW, **_EXPERTS}),
    "cohere": _decoder("Cohere", _FEW),
    "cohere2": _decoder("Cohere2", {**_FEW, **_SLIDING}),
    "starcoder2": _decoder("Starcoder2", _FEW),
    "stablelm": _decoder("StableLm", _FEW),
    "glm": _decoder("Glm", _GROUPS),
    "glm4": _decoder("Glm4", _GROUPS),
    "nemotron": _decoder("Nemotron", _FEW),
    "helium": _decoder("Helium", _GROUPS),
    "arcee": _decoder("Arcee", _GROUPS),
    "seed_oss": _decoder("SeedOss", _GROUPS),
    "exaone4": _decoder("Exaone4", {**_GROUPS, **_SLIDING}),
    "ernie4_5": _decoder("Ernie4_5", _GROUPS),
    "hunyuan": _decoder("HunYuanDenseV1", _GROUPS),
    "apertus": _decoder("Apertus", _GROUPS),
    # joint projections in each model's own order, positions of every kind
    "gpt2": Case("decoder", "GPT2LMHeadModel", "GPT2Config", {**_GPT, **_NO_PDROP}),
    "gpt_neo": _decoder("GPTNeo", _GPT_NEO),
    "gpt_neox": _decoder("GPTNeoX", _TEXT),
    "gptj": _decoder("GPTJ", {**_GPT, **_NO_PDROP, "rotary_dim": 4}),
    "codegen": _decoder("CodeGen", {**_GPT, **_NO_PDROP, "rotary_dim": 4}),
    "gpt_bigcode": _decoder("GPTBigCode", {**_GPT, **_NO_PDROP}),
    "bloom": _decoder("Bloom", {**_TEXT, "seq_length": 64}),
    "falcon": _decoder("Falcon", _TEXT),
    "falcon_alibi": _decoder("Falcon", {**_TEXT, "alibi": True}),
    "opt": _decoder("OPT", {**_TEXT, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}),
    "biogpt": _decoder("BioGpt", {**_BERT, "layerdrop": 0.0, "activation_dropout": 0.0}),
    # query, key and value, the output projection beside them
    "bert": _encoder("Bert", _BERT),
    "bert_decoder": Case("decoder", "BertLMHeadModel", "BertConfig", {**_BERT, "is_decoder": True}),
    "roberta": _encoder("Roberta", _BERT),
    "camembert": _encoder("Camembert", _BERT),
    "xlm_roberta": _encoder("XLMRoberta", _BERT),
    "electra": _encoder("Electra", {**_BERT, "embedding_size": 16}),
    "esm": _encoder("Esm", {**_BERT, **_ESM}),
    "albert": _encoder("Albert", {**_BERT, **_SHARED}),
    "mpnet": _encoder("MPNet", {**_BERT, "pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": _encoder("DistilBert", _DISTILBERT),
    "modernbert": _encoder("ModernBert", {**_TEXT, **_MODERN}),
    # pictures
    "vit": Case("picture", "ViTModel", "ViTConfig", _PICTURE),
    "vit_msn": Case("picture", "ViTMSNModel", "ViTMSNConfig", _PICTURE),
    "deit": Case("picture", "DeiTModel", "DeiTConfig", _PICTURE),
    "dinov2": Case("picture", "Dinov2Model", "Dinov2Config", _PICTURE),
    "dinov2_registers": Case("picture", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _PICTURE),
    "dinov3": Case("picture", "DINOv3ViTModel", "DINOv3ViTConfig", _PICTURE),
    "clip_vision": Case("picture", "CLIPVisionModel", "CLIPVisionConfig", _PICTURE),
    "siglip_vision": Case("picture", "SiglipVisionModel", "SiglipVisionConfig", _PICTURE),
    "clip_text": Case("encoder", "CLIPTextModel", "CLIPTextConfig", _TEXT),
    "siglip_text": Case("encoder", "SiglipTextModel", "SiglipTextConfig", _TEXT),
    # sound
    "wav2vec2": Case("sound", "Wav2Vec2Model", "Wav2Vec2Config", _SPEECH),
    "hubert": Case("sound", "HubertModel", "HubertConfig", _SPEECH),
    # an encoder and a decoder, with cross-attention that stays
    "bart": _pair("Bart", _PAIR),
    "mbart": _pair("MBart", _PAIR),
    "marian": Case("pair", "MarianMTModel", "MarianConfig", _PAIR),
    "pegasus": _pair("Pegasus", _PAIR),
    "blenderbot": _pair("Blenderbot", _PAIR),
    "whisper": _pair("Whisper", _WHISPER),
    "t5": _pair("T5", _T5),
    "mt5": _pair("MT5", _T5),
}


# releases that build these models as their adapters know them; the adapters refuse older ones, or calls fail
SINCE = {
    **dict.fromkeys(("vit", "vit_msn", "deit", "dinov2", "dinov2_registers"), "5.18"),
    **dict.fromkeys(("codegen", "nemotron", "modernbert", "siglip_text", "wav2vec2", "hubert", "t5", "mt5"), "5.24"),
}


def skip_if_older(name: str) -> None:
    """Skip where the transformers that is installed builds this host otherwise."""
    if Version(transformers.__version__) < Version(SINCE.get(name, "5.5")):
        pytest.skip(f"transformers {transformers.__version__} builds {name} otherwise: {SINCE[name]} or later")


def stock(name: str, **options: Any) -> nn.Module:
    """The host as it is, in evaluation mode, its weights random, in float64."""
    skip_if_older(name)
    case = HOSTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**(case.fields | options))
    if "num_experts" in case.fields:  # the default path of experts has no float64
        config._experts_implementation = "eager"
    model: nn.Module = getattr(transformers, case.model)(config).eval()
    randomize(model)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding or special."""
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, batch: int = 2) -> dict[str, Tensor]:
    """What the host is called with."""
    kind, generator = HOSTS[name].kind, torch.Generator().manual_seed(1)
    if kind == "picture":
        return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=generator, dtype=torch.float64)}
    if kind == "sound":
        return {"input_values": torch.randn(batch, 60, generator=generator, dtype=torch.float64)}
    if name == "whisper":
        sound = torch.randn(batch, 8, 40, generator=generator, dtype=torch.float64)
        return {"input_features": sound, "decoder_input_ids": tokens(batch, 7)}
    ids = {"input_ids": tokens(batch, 9)}
    return ids | {"decoder_input_ids": tokens(batch, 7, seed=2)} if kind == "pair" else ids
