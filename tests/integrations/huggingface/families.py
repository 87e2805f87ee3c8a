"""A tiny model of every transformers host that has an adapter, made from its config: nothing is downloaded."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn

Kind = Literal["decoder", "encoder", "picture", "sound", "pair"]

VOCAB = 67
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_GROUPS = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
_GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **_TOKENS}
_NO_PDROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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


HOSTS: dict[str, Case] = {
    # separate or joint projections, rotary angles
    "llama": Case("decoder", "LlamaForCausalLM", "LlamaConfig", _GROUPS),
    "mistral": Case("decoder", "MistralForCausalLM", "MistralConfig", {**_GROUPS, "sliding_window": 6}),
    "mixtral": Case("decoder", "MixtralForCausalLM", "MixtralConfig", {**_GROUPS, **_EXPERTS}),
    "qwen2": Case("decoder", "Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, "num_key_value_heads": 2}),
    "qwen2_moe": Case("decoder", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_TEXT, "num_key_value_heads": 2, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": Case("decoder", "Qwen3ForCausalLM", "Qwen3Config", _GROUPS),
    "qwen3_moe": Case("decoder", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPS, **_EXPERTS}),
    "gemma": Case("decoder", "GemmaForCausalLM", "GemmaConfig", _GROUPS),
    "gemma2": Case("decoder", "Gemma2ForCausalLM", "Gemma2Config", {**_GROUPS, **_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": Case("decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPS, **_SLIDING, "query_pre_attn_scalar": 8}),
    "phi": Case("decoder", "PhiForCausalLM", "PhiConfig", {**_TEXT, "num_key_value_heads": 2}),
    "phi3": Case("decoder", "Phi3ForCausalLM", "Phi3Config", {**_TEXT, "num_key_value_heads": 2, "original_max_position_embeddings": 64}),
    "phimoe": Case("decoder", "PhimoeForCausalLM", "PhimoeConfig", {**_TEXT, "num_key_value_heads": 2, **_EXPERTS}),
    "olmo": Case("decoder", "OlmoForCausalLM", "OlmoConfig", {**_TEXT, "num_key_value_heads": 2}),
    "olmo2": Case("decoder", "Olmo2ForCausalLM", "Olmo2Config", {**_TEXT, "num_key_value_heads": 2}),
    "olmo3": Case("decoder", "Olmo3ForCausalLM", "Olmo3Config", {**_TEXT, "num_key_value_heads": 2, **_SLIDING}),
    "smollm3": Case("decoder", "SmolLM3ForCausalLM", "SmolLM3Config", {**_TEXT, "num_key_value_heads": 2, "no_rope_layers": [1, 0]}),
    "granite": Case("decoder", "GraniteForCausalLM", "GraniteConfig", {**_TEXT, "num_key_value_heads": 2}),
    "granitemoe": Case("decoder", "GraniteMoeForCausalLM", "GraniteMoeConfig", {**_TEXT, "num_key_value_heads": 2, **_EXPERTS}),
    "cohere": Case("decoder", "CohereForCausalLM", "CohereConfig", {**_TEXT, "num_key_value_heads": 2}),
    "cohere2": Case("decoder", "Cohere2ForCausalLM", "Cohere2Config", {**_TEXT, "num_key_value_heads": 2, **_SLIDING}),
    "starcoder2": Case("decoder", "Starcoder2ForCausalLM", "Starcoder2Config", {**_TEXT, "num_key_value_heads": 2}),
    "stablelm": Case("decoder", "StableLmForCausalLM", "StableLmConfig", {**_TEXT, "num_key_value_heads": 2}),
    "glm": Case("decoder", "GlmForCausalLM", "GlmConfig", _GROUPS),
    "glm4": Case("decoder", "Glm4ForCausalLM", "Glm4Config", _GROUPS),
    "nemotron": Case("decoder", "NemotronForCausalLM", "NemotronConfig", {**_TEXT, "num_key_value_heads": 2}),
    "helium": Case("decoder", "HeliumForCausalLM", "HeliumConfig", _GROUPS),
    "arcee": Case("decoder", "ArceeForCausalLM", "ArceeConfig", _GROUPS),
    "seed_oss": Case("decoder", "SeedOssForCausalLM", "SeedOssConfig", _GROUPS),
    "exaone4": Case("decoder", "Exaone4ForCausalLM", "Exaone4Config", {**_GROUPS, **_SLIDING}),
    "ernie4_5": Case("decoder", "Ernie4_5ForCausalLM", "Ernie4_5Config", _GROUPS),
    "hunyuan": Case("decoder", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _GROUPS),
    "apertus": Case("decoder", "ApertusForCausalLM", "ApertusConfig", _GROUPS),
    # joint projections in each model's own order, positions of every kind
    "gpt2": Case("decoder", "GPT2LMHeadModel", "GPT2Config", {**_GPT, **_NO_PDROP}),
    "gpt_neo": Case("decoder", "GPTNeoForCausalLM", "GPTNeoConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6, "max_position_embeddings": 64, "intermediate_size": 48, "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0, **_TOKENS}),
    "gpt_neox": Case("decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "gptj": Case("decoder", "GPTJForCausalLM", "GPTJConfig", {**_GPT, **_NO_PDROP, "rotary_dim": 4}),
    "falcon": Case("decoder", "FalconForCausalLM", "FalconConfig", _TEXT),
    "falcon_alibi": Case("decoder", "FalconForCausalLM", "FalconConfig", {**_TEXT, "alibi": True}),
    "opt": Case("decoder", "OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}),
    "biogpt": Case("decoder", "BioGptForCausalLM", "BioGptConfig", {**_TEXT, **_NO_DROPOUT, "layerdrop": 0.0, "activation_dropout": 0.0}),
    # query, key and value, the output projection beside them
    "bert": Case("encoder", "BertForMaskedLM", "BertConfig", {**_TEXT, **_NO_DROPOUT}),
    "bert_decoder": Case("decoder", "BertLMHeadModel", "BertConfig", {**_TEXT, **_NO_DROPOUT, "is_decoder": True}),
    "roberta": Case("encoder", "RobertaForMaskedLM", "RobertaConfig", {**_TEXT, **_NO_DROPOUT}),
    "camembert": Case("encoder", "CamembertForMaskedLM", "CamembertConfig", {**_TEXT, **_NO_DROPOUT}),
    "xlm_roberta": Case("encoder", "XLMRobertaForMaskedLM", "XLMRobertaConfig", {**_TEXT, **_NO_DROPOUT}),
    "electra": Case("encoder", "ElectraForMaskedLM", "ElectraConfig", {**_TEXT, **_NO_DROPOUT, "embedding_size": 16}),
    "esm": Case("encoder", "EsmForMaskedLM", "EsmConfig", {**_TEXT, **_NO_DROPOUT, "mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False}),
    "distilbert": Case("encoder", "DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, **_TOKENS}),
    "modernbert": Case("encoder", "ModernBertForMaskedLM", "ModernBertConfig", {**_TEXT, "layer_types": ["full_attention", "full_attention"], "cls_token_id": 1, "sep_token_id": 2}),
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
    "bart": Case("pair", "BartForConditionalGeneration", "BartConfig", _PAIR),
    "mbart": Case("pair", "MBartForConditionalGeneration", "MBartConfig", _PAIR),
    "marian": Case("pair", "MarianMTModel", "MarianConfig", _PAIR),
    "pegasus": Case("pair", "PegasusForConditionalGeneration", "PegasusConfig", _PAIR),
    "blenderbot": Case("pair", "BlenderbotForConditionalGeneration", "BlenderbotConfig", _PAIR),
    "whisper": Case("pair", "WhisperForConditionalGeneration", "WhisperConfig", {**{k: v for k, v in _PAIR.items() if k != "max_position_embeddings"}, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64, "suppress_tokens": None, "begin_suppress_tokens": None}),
    "t5": Case("pair", "T5ForConditionalGeneration", "T5Config", _T5),
    "mt5": Case("pair", "MT5ForConditionalGeneration", "MT5Config", _T5),
}  # fmt: skip


def stock(name: str, **options: Any) -> nn.Module:
    """The host as it is, in evaluation mode, its weights random, in float64."""
    case = HOSTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**(case.fields | options))
    if "num_experts" in case.fields:  # the default path of experts has no float64
        config._experts_implementation = "eager"
    model: nn.Module = getattr(transformers, case.model)(config).eval()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:  # sinusoids, which are not saved
            continue
        parameter.data = parameter.data.double()  # not the buffers: angles are float32 in every model
        if parameter.ndim == 1 and "bias" not in key:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.2)
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
