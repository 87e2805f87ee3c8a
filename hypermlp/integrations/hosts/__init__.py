"""Adapters of models by other people, one small file for each family, loaded when a model needs them.

Each file has one adapter, called ``ADAPTER``.
"""

from __future__ import annotations


def _of_transformers(**models: str) -> list[str]:
    return [f"transformers.models.{model}.modeling_{model}.{name}" for model, name in models.items()]


# which classes each file reads: the class whose forward runs, and where it was written
CLASSES: dict[str, list[str]] = {
    "llama": _of_transformers(
        apertus="ApertusAttention",
        arcee="ArceeAttention",
        codegen="CodeGenAttention",
        cohere="CohereAttention",
        cohere2="Cohere2Attention",
        ernie4_5="Ernie4_5Attention",
        exaone4="Exaone4Attention",
        gemma="GemmaAttention",
        gemma2="Gemma2Attention",
        gemma3="Gemma3Attention",
        glm="GlmAttention",
        glm4="Glm4Attention",
        gptj="GPTJAttention",
        granite="GraniteAttention",
        granitemoe="GraniteMoeAttention",
        helium="HeliumAttention",
        hunyuan_v1_dense="HunYuanDenseV1Attention",
        llama="LlamaAttention",
        mistral="MistralAttention",
        mixtral="MixtralAttention",
        nemotron="NemotronAttention",
        olmo="OlmoAttention",
        olmo2="Olmo2Attention",
        olmo3="Olmo3Attention",
        phi="PhiAttention",
        phi3="Phi3Attention",
        phimoe="PhimoeAttention",
        qwen2="Qwen2Attention",
        qwen2_moe="Qwen2MoeAttention",
        qwen3="Qwen3Attention",
        qwen3_moe="Qwen3MoeAttention",
        seed_oss="SeedOssAttention",
        smollm3="SmolLM3Attention",
        stablelm="StableLmAttention",
        starcoder2="Starcoder2Attention",
    ),
    "gpt2": _of_transformers(gpt2="GPT2Attention"),
    "gpt_neo": _of_transformers(gpt_neo="GPTNeoSelfAttention"),
    "gpt_neox": _of_transformers(gpt_neox="GPTNeoXAttention"),
    "gpt_bigcode": _of_transformers(gpt_bigcode="GPTBigCodeAttention"),
    "bloom": _of_transformers(bloom="BloomAttention"),
    "falcon": _of_transformers(falcon="FalconAttention"),
    "bert": _of_transformers(
        bert="BertSelfAttention",
        camembert="CamembertSelfAttention",
        electra="ElectraSelfAttention",
        esm="EsmSelfAttention",
        roberta="RobertaSelfAttention",
        xlm_roberta="XLMRobertaSelfAttention",
    ),
    "albert": _of_transformers(albert="AlbertAttention"),
    "mpnet": _of_transformers(mpnet="MPNetSelfAttention"),
    "distilbert": _of_transformers(distilbert="DistilBertSelfAttention"),
    "modernbert": _of_transformers(modernbert="ModernBertAttention"),
    "vit": _of_transformers(
        deit="DeiTAttention",
        dinov2="Dinov2Attention",
        dinov2_with_registers="Dinov2WithRegistersAttention",
        dinov3_vit="DINOv3ViTAttention",
        vit="ViTAttention",
        vit_msn="ViTMSNAttention",
    ),
    "clip": _of_transformers(clip="CLIPAttention", siglip="SiglipAttention"),
    "bart": _of_transformers(
        bart="BartAttention",
        biogpt="BioGptAttention",
        blenderbot="BlenderbotAttention",
        hubert="HubertAttention",
        marian="MarianAttention",
        mbart="MBartAttention",
        opt="OPTAttention",
        pegasus="PegasusAttention",
        wav2vec2="Wav2Vec2Attention",
        whisper="WhisperAttention",
    ),
    "t5": _of_transformers(mt5="MT5Attention", t5="T5Attention"),
    "torch_nn": ["torch.nn.modules.activation.MultiheadAttention"],
    # before timm 1.0.17 it stood in the second place
    "timm": ["timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"],
    "vit_pytorch": ["vit_pytorch.vit.Attention", "vit_pytorch.simple_vit.Attention"],
    "x_transformers": ["x_transformers.x_transformers.Attention"],
    "monai": ["monai.networks.blocks.selfattention.SABlock"],
    "open_clip": ["open_clip.transformer.Attention"],
    # its model.py is copied, so the name of its class is all there is; the adapter looks how it is built
    "nanogpt": ["CausalSelfAttention"],
}

MODULES: dict[str, str] = {path: module for module, paths in CLASSES.items() for path in paths}
