"""The language model as a Hugging Face family: the same blocks under the names that ecosystem knows."""

from __future__ import annotations

from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from hypermlp.checks import as_flag, check_kind
from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.huggingface.cache import check_cache
from hypermlp.integrations.huggingface.masks import check_tensors, document_bounds
from hypermlp.integrations.huggingface.names import CACHE_NAME, CACHE_NAMES, IGNORED_BY_MODELS, one_cache
from hypermlp.integrations.huggingface.refused import refuse_caches, refuse_continuous_batching
from hypermlp.layers import AttentionLayer
from hypermlp.layers.projection import Embedding, Projection, start_afresh
from hypermlp.models.huggingface.configuration import HyperMLPConfig
from hypermlp.models.huggingface.decoder_layer import HyperMLPDecoderLayer, mask_of_new_tokens, packed_bounds
from hypermlp.models.language_model import LanguageModel, under_family_names

# what callers say about the loss
_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")

logger = logging.get_logger(__name__)


class HyperMLPPreTrainedModel(PreTrainedModel):
    """What the models of the family share: their start, and what Transformers may do with them."""

    config_class = HyperMLPConfig
    config: HyperMLPConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HyperMLPDecoderLayer",)
    _skip_keys_device_placement = CACHE_NAMES
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HyperMLPDecoderLayer}  # noqa: RUF012

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As for a model of Transformers' own: else it would leave blocks out, which have no direct parameters."""
        super()._initialize_weights(module, False)

    def _init_weights(self, module: nn.Module) -> None:
        """Start what ``module`` holds itself as the plain language model does, except what a checkpoint has filled."""
        own = list(module.parameters(recurse=False))
        loaded = [(p, p.detach().clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) == len(own):
            return
        # a classifier's, or made by Transformers
        if isinstance(module, (nn.Linear, nn.Embedding)) and not isinstance(module, (Projection, Embedding)):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        else:
            start_afresh(module)
        for parameter, value in loaded:
            parameter.data.copy_(value)

    @wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # as it stands: single layers may have been extended since
        attention = enumerate(getattr(layer, "attention", None) for layer in self.base_model.layers)
        known = {index: layer.config.max_lag for index, layer in attention if isinstance(layer, AttentionLayer)}
        self.config.note_max_lags(known)
        super().save_pretrained(*args, **kwargs)


class HyperMLPModel(HyperMLPPreTrainedModel):
    """Embedding, blocks and a last RMSNorm: tokens to hidden states.

    Args:
        config: a :class:`HyperMLPConfig`.

    Example:
        >>> model = HyperMLPModel(HyperMLPConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2))
        >>> model(torch.zeros(1, 10, dtype=torch.long)).last_hidden_state.shape
        torch.Size([1, 10, 64])
    """

    def __init__(self, config: HyperMLPConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyperMLPDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        is_causal: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: 0/1 ``[B, T]``, or ``[B, past + T]`` with a cache. Additive and 4-D masks
                are not taken.
            position_ids: ``[B, T]``. Positions count from each sequence's first valid token, so these
                say one thing only: without mask and cache, a number that does not follow the one
                before it begins another packed document. In compiled and exported models rows with
                positions count as packed, whatever these are, and no cache is made for them.
            cache: earlier tokens, which these follow and are added to; for inference.
            inputs_embeds: ``[B, T, hidden_size]`` in place of ``input_ids``.
            use_cache: return a cache. None: as the configuration says, and not while gradients are on.
                Packed documents have none.
            output_attentions: return each layer's map from values to what its heads read.
            cu_seq_lens_q: bounds of packed documents, int32 or int64 ``[N + 1]``, in the batch's rows laid
                end to end, as ``DataCollatorWithFlattening`` gives them.
            cu_seq_lens_k: the same, if it is given.
            seq_idx: the number of each token's document, ``[B, T]``, in the place of bounds.
            is_causal: True, if it is given.
            past_key_values: what ``cache`` is called in Transformers before 5.24; both names are taken in all.
            kwargs: what Transformers' decorators and collators add and means nothing to the model
                (:data:`IGNORED_BY_MODELS`); a TypeError for anything else.
        """
        refuse_unknown(kwargs, IGNORED_BY_MODELS, type(self).__name__, "transformers", otherwise="", door=self.forward)
        check_tensors(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids
        )
        if use_cache is not None:
            use_cache = as_flag("use_cache", use_cache)
        if is_causal is False:
            raise ValueError("is_causal=False: the family is causal")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        cache = one_cache(cache=cache, past_key_values=past_key_values)
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens = document_bounds(embeddings, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        if cu_seqlens is None and attention_mask is None and cache is None and position_ids is not None:
            if any(getattr(m, "over_processes", None) for m in self.modules()):
                raise ValueError("after shard_sequence positions are known: leave position_ids out")
            cu_seqlens = packed_bounds(position_ids)
        if cache is not None:
            check_cache(cache)
        if cu_seqlens is not None and cache is not None:
            raise ValueError("packed documents cannot follow or fill a cache: leave the cache out")
        if cache is None and cu_seqlens is None and self._wants_cache(use_cache):
            cache = DynamicCache(config=self.config)
        hidden_states = embeddings * self.config.hidden_size**0.5
        if attention_mask is not None:
            attention_mask = mask_of_new_tokens(attention_mask, hidden_states.shape[1], cache)
        maps: list[Tensor] = []
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask,
                cu_seqlens=cu_seqlens,
                output_attentions=output_attentions,
                **{CACHE_NAME: cache},  # gradient checkpointing looks for it under this name
            )
            if output_attentions:
                hidden_states, layer_map = hidden_states
                maps += [] if layer_map is None else [layer_map]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            attentions=tuple(maps) if output_attentions else None,
            **{CACHE_NAME: cache},
        )

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            return self.config.use_cache and not torch.is_grad_enabled()
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: no cache is returned")
            return False
        return use_cache


class HyperMLPForCausalLM(HyperMLPPreTrainedModel, GenerationMixin):
    """The language model: :class:`HyperMLPModel` and a head, tied to the embedding unless the configuration says no.

    Args:
        config: a :class:`HyperMLPConfig`.

    Example:
        >>> model = HyperMLPForCausalLM(HyperMLPConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2))
        >>> model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=6, do_sample=False).shape
        torch.Size([1, 10])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: HyperMLPConfig) -> None:
        super().__init__(config)
        self.model = HyperMLPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel, **options: Any) -> HyperMLPForCausalLM:
        """The Hugging Face form of a plain language model, with its weights.

        Args:
            model: such as one trained by ``hypermlp train``.
            options: fields of :class:`HyperMLPConfig`, such as ``eos_token_id``.
        """
        check_kind("model", model, LanguageModel)
        weight = model.embedding.weight
        new: HyperMLPForCausalLM = cls(HyperMLPConfig.from_language_model(model.config, **options))
        state = under_family_names(model.state_dict())
        if model.head is None:
            state["lm_head.weight"] = weight
        new.to(weight.device, weight.dtype).load_state_dict(state)
        return new

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each, and the loss if there are labels.

        Args:
            labels: int64 ``[B, T]``, the tokens themselves (the loss shifts them), -100 where there is
                nothing to predict.
            logits_to_keep: only the last so many tokens' logits, or those at these indices; 0 for all.
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, past_key_values, kwargs: see
                :meth:`HyperMLPModel.forward`.
        """
        check_tensors(labels=labels)
        loss_options = {name: kwargs.pop(name) for name in _LOSS_OPTIONS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache=cache, past_key_values=past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if not isinstance(logits_to_keep, (int, slice, list)):
            check_kind("logits_to_keep", logits_to_keep, Tensor, "or a number of tokens")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or loss_options.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see :func:`~hypermlp.integrations.huggingface.refused.refuse_continuous_batching`."""
        refuse_continuous_batching()

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_caches(generation_config)
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The mask of the new tokens, ``[B, T]``: of one shape for a compiled step, where 4-D masks are usual."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]


class HyperMLPForSequenceClassification(GenericForSequenceClassification, HyperMLPPreTrainedModel):
    """A classifier of whole texts: the last token that is not ``pad_token_id`` decides."""
