"""The configuration of the Hugging Face form of the language model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hypermlp.checks import as_flag, as_integer, called_here, check_kind, integer, keep
from hypermlp.config import HyperConfig
from hypermlp.integrations.huggingface.names import CACHE_NAMES
from hypermlp.models.language_model import LanguageModelConfig

# module that a checkpoint carries, and what it offers to the Auto classes
_FINDER = "find_hypermlp"
_FAMILY = {
    "AutoConfig": "HyperMLPConfig",
    "AutoModel": "HyperMLPModel",
    "AutoModelForCausalLM": "HyperMLPForCausalLM",
    "AutoModelForSequenceClassification": "HyperMLPForSequenceClassification",
}

# fields of LanguageModelConfig but those of attention, by the names that they have here
_PLAIN_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
}
# fields of every attention layer, which stand in attention
_OF_LAYERS = {field.name for field in dataclasses.fields(HyperConfig)} - {"hidden_size", "num_heads"}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# what configs of other decoders have and this family has not
_NOT_HERE = {
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "embd_pdrop", "hidden_act",
    "hidden_dropout", "hidden_dropout_prob", "initializer_range", "mlp_bias", "num_key_value_heads", "resid_pdrop",
    "rope_parameters", "rope_scaling",
}  # fmt: skip
# of two names: sep_token_id and eos_token_id are less alike
_MISSPELT = 0.9


class HyperMLPConfig(PreTrainedConfig):
    """What a HyperMLP language model computes.

    What an attention layer computes stands in a :class:`~hypermlp.HyperConfig`, as everywhere in
    this library; here it is held as plain values, all resolved, so that ``config.json`` says
    everything and a later version's defaults change no checkpoint.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the model.
        intermediate_size: width inside each block's SwiGLU. None: ``8/3 * hidden_size``, rounded up
            to a multiple of 16.
        num_hidden_layers: Transformer blocks.
        num_attention_heads: heads of every attention layer that does not say its own ``num_heads``.
        attention: fields of :class:`~hypermlp.HyperConfig`, ``hidden_size`` left out or equal: a
            mapping, a HyperConfig, or a sequence of those, one per layer. None: its defaults,
            HyperGLU, whose tables of 2048 lags outweigh a small model: give it a ``max_lag``.
        max_position_embeddings: tokens the model was trained to look back over. Nothing is cut off
            there; evaluation tools read it. None for no limit.
        rms_norm_eps: of the RMSNorms.
        use_cache: return a cache from calls without gradients.
        tie_word_embeddings: let the head share the embedding's weights.
        pad_token_id, bos_token_id, eos_token_id: as everywhere in Transformers.

    Example:
        >>> config = HyperMLPConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, attention={"max_lag": 128})
        >>> config.attention_config(0).mixer
        'hyperglu'
    """

    model_type = "hypermlp"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)
    # attention is whole on every device: its few wide heads share lag tables with no style to split them
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 2
    attention: Any = None
    max_position_embeddings: int | None = 2048
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # a saved one is read as it stands, alone or as a part of another, which says no version
        if self.transformers_version is None and "model_type" not in kwargs:
            # None asks for nothing
            _check_names(
                [name for name, value in kwargs.items() if value is not None and name not in self.attribute_map]
            )
            keep(self, ("use_cache",), as_flag)
            keep(self, ("num_attention_heads",), as_integer, 1)
            keep(self, [name for name in _TOKENS if integer(getattr(self, name)) is not None], as_integer)
        layers = [self._layer_model(layer) for layer in self._attention_fields()]
        for own, name in _PLAIN_NAMES.items():
            setattr(self, own, getattr(layers[0], name))
        attention = [layer.attention.to_dict() for layer in layers]
        self.attention = attention[0] if len(attention) == 1 else attention
        super().__post_init__(**kwargs)

    def _attention_fields(self) -> list[dict[str, Any]]:
        """The fields given for each layer, or those of all layers once."""
        given = self.attention
        if isinstance(given, Sequence) and not isinstance(given, str):
            if len(given) != self.num_hidden_layers:
                raise ValueError(
                    f"attention must be one description or num_hidden_layers={self.num_hidden_layers} of them, "
                    f"got {len(given)}"
                )
            entries = list(given)
        else:
            entries = [{} if given is None else given]
        for entry in entries:
            if not isinstance(entry, (Mapping, HyperConfig)):
                raise TypeError(f"attention must be fields of HyperConfig, got {entry!r}")
        return [entry.to_dict() if isinstance(entry, HyperConfig) else dict(entry) for entry in entries]

    def _layer_model(self, attention: dict[str, Any]) -> LanguageModelConfig:
        """The plain language model of these sizes: the one home of their checks and defaults."""
        sizes = {"hidden_size": self.hidden_size, "num_heads": self.num_attention_heads}
        plain = {name: getattr(self, own) for own, name in _PLAIN_NAMES.items()}
        try:
            return LanguageModelConfig(attention=HyperConfig(**(sizes | attention)), **plain)
        except (TypeError, ValueError) as error:
            message = str(error)
            own_heads = "num_heads" in attention or isinstance(error, TypeError)  # which names keywords of attention
            for own, name in (_PLAIN_NAMES | ({} if own_heads else {"num_attention_heads": "num_heads"})).items():
                message = message.replace(name, own)
            raise type(error)(message) from None

    @classmethod
    def from_language_model(cls, config: LanguageModelConfig, **options: Any) -> HyperMLPConfig:
        """The Hugging Face form of a plain language model's description.

        Args:
            config: of a :class:`~hypermlp.models.LanguageModel`.
            options: other fields, which win.
        """
        check_kind("config", config, LanguageModelConfig, "a LanguageModel has it as model.config")
        fields = {own: getattr(config, name) for own, name in _PLAIN_NAMES.items()}
        if config.context_length is None:
            del fields["max_position_embeddings"]
        attention: Any = config.attention
        if config.max_lags is not None:
            attention = [config.attention_config(index) for index in range(config.num_layers)]
        fields |= {"attention": attention, "num_attention_heads": config.attention.num_heads}
        return cls(**(fields | options))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write ``config.json``, and beside it where tools that never heard of this library find the family.

        With ``trust_remote_code=True`` they open the checkpoint wherever hypermlp is installed.
        """
        self.auto_map = {auto: f"{_FINDER}.{name}" for auto, name in _FAMILY.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        names = ", ".join(sorted(_FAMILY.values()))
        (Path(save_directory) / f"{_FINDER}.py").write_text(
            f"from hypermlp.models.huggingface import {names}  # noqa: F401  (hypermlp with its extra hf)\n"
        )

    def attention_config(self, layer_idx: int) -> HyperConfig:
        """What the attention of layer ``layer_idx`` computes."""
        fields = self.attention[layer_idx] if isinstance(self.attention, list) else self.attention
        return HyperConfig(**fields)

    def note_max_lags(self, lags: Mapping[int, int | None]) -> None:
        """Note how many lags some layers, by their places, know now, where that is not what is described."""
        count = len(self.attention) if isinstance(self.attention, list) else self.num_hidden_layers
        described = [self.attention_config(index).to_dict() for index in range(count)]
        noted = [fields | {"max_lag": lags.get(index, fields["max_lag"])} for index, fields in enumerate(described)]
        if noted != described:
            self.attention = noted

    def extend_max_lag(self, max_lag: int) -> None:
        """Note that layers by lag know ``max_lag`` lags now: what :func:`hypermlp.extend_max_lag` calls."""
        described = self.attention if isinstance(self.attention, list) else [self.attention]
        for fields in described:
            if fields["mixer"] in ("hyperglu", "hypermlp") and fields["layout"] == "lag":
                fields["max_lag"] = max(fields["max_lag"], max_lag)
        if self.max_position_embeddings is not None:
            self.max_position_embeddings = max(self.max_position_embeddings, max_lag)


def _check_names(others: Iterable[str]) -> None:
    """TypeError for fields of other configs of this library and misspelt ones, which nobody would read."""
    own = {plain: name for name, plain in _PLAIN_NAMES.items()} | {"num_heads": "num_attention_heads"}
    for name in others:
        if meant := own.get(name) or next(iter(called_here(name, own.values())), None):
            raise TypeError(f"{name} is called {meant} here: HyperMLPConfig({meant}=...)")
        if of_layers := [name] if name in _OF_LAYERS else called_here(name, _OF_LAYERS):
            what = " and ".join(of_layers)
            is_one = f"{name} is" if what == name else f"{name} is here {what},"
            fields = ", ".join(f"{field!r}: ..." for field in of_layers)
            raise TypeError(f"{is_one} a field of the attention layers: HyperMLPConfig(attention={{{fields}}})")
        if name in _NOT_HERE:
            raise TypeError(f"HyperMLPConfig takes no {name!r}: the family has nothing that it would change")
        # what is like no field may be a user's own: transformers keeps it
        if near := get_close_matches(name, {*HyperMLPConfig.__annotations__, *_OF_LAYERS}, 1, _MISSPELT):
            meant = f"attention={{{near[0]!r}: ...}}" if near[0] in _OF_LAYERS else near[0]
            raise TypeError(f"HyperMLPConfig takes no {name!r}: did you mean {meant}?")
