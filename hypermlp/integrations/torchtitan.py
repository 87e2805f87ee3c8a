"""Language models of this library in torchtitan 0.2.2's trainer.

FSDP2, HSDP, context parallelism, activation checkpointing, compilation, distributed checkpoints, and export to the
Hugging Face family: ``docs/scale.md`` has the commands and what was run. Other releases register models in other ways,
and 0.3.0 does not run with PyTorch 2.13.

Example:
    A module that ``--experimental.custom_import`` names, for ``--model.name hypermlp --model.flavor small``::

        attention = HyperConfig(768, num_heads=2, max_lag=4096)
        register({"small": LanguageModelConfig(32000, 768, 12, attention)})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.components.validate import build_validator
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from hypermlp.budget import count_block_backward_flops, count_block_flops
from hypermlp.distributed import shard_sequence
from hypermlp.distributed.groups import attention_layers
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.models.language_model import FAMILY_NAMES, under_family_names
from hypermlp.ops.library import PATHS

# what selective checkpointing keeps: every second product of matrices, as of torchtitan's own models, and the operator
_SAVED = {torch.ops.aten.mm.default, *(getattr(torch.ops.hypermlp, f"{path}_forward").default for path in PATHS)}


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of a :class:`~hypermlp.models.LanguageModelConfig`, as torchtitan logs them."""

    model: dict[str, Any] = field(default_factory=dict)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """ValueError for what these models do not have; nothing of a job changes them."""
        job = job_config.parallelism
        needed: dict[str, Any] = dict.fromkeys(
            ("tensor_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree"), 1
        )
        if job.context_parallel_degree > 1:
            # a process has the chunks r and 2 W - 1 - r; keys and values are gathered, or come from its neighbours
            needed |= {"context_parallel_load_balancer": "headtail", "context_parallel_rotate_method": "allgather"}
            if job_config.validation.enable:
                raise ValueError("validation.enable must be False: torchtitan validates in parts by PyTorch's own "
                                 "context_parallel, which knows softmax attention alone")  # fmt: skip
        for name, value in needed.items():
            if getattr(job, name) != value:
                raise ValueError(f"parallelism.{name} must be {value!r} for these models, got {getattr(job, name)!r}")

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and FLOPs of a token, forward and backward."""
        config = LanguageModelConfig(**self.model)
        layers = map(config.attention_config, range(config.num_layers))
        sizes = [(layer, config.intermediate_size, 1, seq_len) for layer in layers]
        blocks = sum(count_block_flops(*size) + count_block_backward_flops(*size) for size in sizes)
        head = 6 * config.hidden_size * config.vocab_size
        return sum(parameter.numel() for parameter in model.parameters()), blocks // seq_len + head


class TitanLanguageModel(LanguageModel):
    """A :class:`~hypermlp.models.LanguageModel` with what torchtitan's trainer calls."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(LanguageModelConfig(**args.model))

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Start every parameter afresh; there are no buffers."""
        self.reset_parameters()

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits ``[B, T, vocab_size]``; the layers know by themselves the positions that context parallelism gives."""
        if positions is not None and not any(layer.over_processes for _, layer in attention_layers(self)):
            raise ValueError("positions came without context parallelism: take a data loader that gives inputs alone")
        return super().forward(tokens)

    def get_attention_masks(self, *args: Any, **kwargs: Any) -> NoReturn:
        """TypeError, which tells torchtitan's validator that a model takes none."""
        raise TypeError("these models take no attention masks")


class FamilyNames(StateDictAdapter):
    """Weights under the names of :class:`~hypermlp.models.huggingface.HyperMLPForCausalLM`, and back."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return under_family_names(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, x in hf_state_dict.items():
            part, name = next((part, name) for part, name in FAMILY_NAMES.items() if key.startswith(f"{name}."))
            found[part + key[len(name) :]] = x
        return found


def parallelize(model: TitanLanguageModel, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """``model`` over processes as the job says: context parallelism, checkpointing, compilation, FSDP2 or HSDP."""
    if parallel_dims.cp_enabled:
        shard_sequence(model, parallel_dims.get_mesh("cp"))
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=_SAVED,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        for block in model.layers:
            block.compile(backend=job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        fully_shard_blocks(model, parallel_dims, job_config)
    elif parallel_dims.dp_replicate_enabled:
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree={parallel_dims.dp_replicate} leaves no process to shard "
            "over, and there is no DDP for these models: take 1 (FSDP2), or fewer (HSDP)"
        )
    return model


def fully_shard_blocks(model: TitanLanguageModel, parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    """A group for each block, and one for the rest: a tied embedding is used twice."""
    training = job_config.training
    options: dict[str, Any] = {
        "mesh": parallel_dims.get_mesh(["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else "fsdp"),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
        "reshard_after_forward": job_config.parallelism.fsdp_reshard_after_forward != "never",
    }
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for part in (*model.layers, model):
        sharded: FSDPModule = fully_shard(part, **options)
        # the trainer divides the loss by the tokens of all: gradients are summed, and no more
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def register(
    models: Mapping[str, LanguageModelConfig],
    name: str = "hypermlp",
    build_dataloader_fn: Callable[..., Any] = build_text_dataloader,
    build_tokenizer_fn: Callable[..., Any] | None = build_hf_tokenizer,
) -> None:
    """Make models known to torchtitan.

    Args:
        models: by the name that ``--model.flavor`` gives them.
        name: of all of them, ``--model.name``.
        build_dataloader_fn: of the data; by default torchtitan's own texts.
        build_tokenizer_fn: of the data loader's tokenizer; None for none.
    """
    register_train_spec(
        name,
        TrainSpec(
            model_cls=TitanLanguageModel,
            model_args={flavor: ModelArgs(model=config.to_dict()) for flavor, config in models.items()},
            parallelize_fn=parallelize,
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=build_dataloader_fn,
            build_tokenizer_fn=build_tokenizer_fn,
            build_loss_fn=build_cross_entropy_loss,
            build_validator_fn=build_validator,
            state_dict_adapter=FamilyNames,
        ),
    )
