"""What one training step costs each process: memory, FLOPs, bytes sent. Formulas, each with its source.

FSDP2 over the mesh's data and sequence dimensions, a group for every block and one for the rest, weights, gradients and
AdamW's two moments in float32, computation in the dtype given; ``shard_heads`` and ``shard_sequence`` of this library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hypermlp.budget import (
    count_block_backward_flops,
    count_block_flops,
    count_block_kept,
    count_block_parameters,
    count_heads_bytes,
    count_norm_kept,
    count_sequence_bytes,
    ring_bytes,
)
from hypermlp.models import LanguageModelConfig
from hypermlp_lab.training.recipe import parameter_count

_FLOAT, _TOKEN = 4, 8


@dataclass(frozen=True)
class Mesh:
    """How processes share the work: rows of the batch, a layer's heads, a sequence's tokens."""

    data: int = 1
    heads: int = 1
    sequence: int = 1

    @property
    def shards(self) -> int:
        """Processes that FSDP2 spreads the model over."""
        return self.data * self.sequence


@dataclass(frozen=True)
class Step:
    """One step of the optimizer.

    Args:
        model: what is trained.
        seq_len: tokens of a sequence.
        batch: sequences, over all processes.
        mesh: of the processes; ``mesh.data * passes`` divides ``batch``.
        itemsize: bytes of an activation: 2 in bfloat16, 4 in float32.
        checkpointing: whether each block is computed once more in the backward, from its input.
        passes: micro batches one after the other.
        fused_norm: see :func:`hypermlp.budget.count_block_kept`.
    """

    model: LanguageModelConfig
    seq_len: int
    batch: int
    mesh: Mesh = Mesh()
    itemsize: int = 2
    checkpointing: bool = False
    passes: int = 1
    fused_norm: bool = True

    @property
    def rows(self) -> int:
        """Sequences of one pass, over the processes that share them."""
        return self.batch // (self.mesh.data * self.passes)

    @property
    def tokens(self) -> int:
        """Tokens that one process has in one pass."""
        return self.rows * self.seq_len // self.mesh.sequence

    @cached_property
    def part(self) -> LanguageModelConfig:
        """The model that one process has before FSDP2: some of the heads."""
        c, heads = self.model.attention, self.mesh.heads
        part = replace(c, num_heads=c.num_heads // heads, qk_dim=c.qk_dim // heads, v_dim=c.v_dim // heads)
        return replace(self.model, attention=part)

    def memory(self) -> dict[str, int]:
        """Bytes of one process, by what they are for.

        - Weights and gradients: this process's shard of each, and while a block is computed what it gathers: the root
          group, which stays (``fully_shard`` reshards all others after their forward), this block and the next. A
          gradient is whole, and once more in float32 to be sent, while it is reduced.
        - Optimizer: AdamW has two moments of each parameter.
        - The operator, and activations: :func:`hypermlp.budget.count_block_kept` of all blocks. With checkpointing
          it is the input of all, and of one block the operator's part and "block", the rest, when the logits have gone.
          Token ids, and the last norm with what it gives the head.
        - Logits: the logarithm of their softmax and two gradients of it, in float32 (``next_token_loss``).

        Gradients of activations and workspaces come on top; :mod:`hypermlp_lab.plan.command` leaves room for them.
        """
        m, e = self.part, self.itemsize
        whole, block = parameter_count(m), count_block_parameters(m.attention, m.intermediate_size)
        root, shards = whole - m.num_layers * block, self.mesh.shards
        own = -(-whole // shards)
        gathered = shards > 1 or e < _FLOAT
        kept = count_block_kept(
            m.attention, m.intermediate_size, self.rows, self.seq_len,
            itemsize=e, processes=self.mesh.sequence, fused_norm=self.fused_norm,
        )  # fmt: skip
        at_once = 1 if self.checkpointing else m.num_layers
        inputs = e * self.tokens * m.hidden_size * m.num_layers
        norm = count_norm_kept(m.hidden_size, self.tokens, itemsize=e, fused=self.fused_norm)
        head = norm + self.tokens * (_TOKEN + e * m.hidden_size)
        return {
            "weights": _FLOAT * own + gathered * e * (root + min(2, m.num_layers) * block),
            "gradients": _FLOAT * own + gathered * (e * (root + block) + _FLOAT * max(root, block)),
            "optimizer": 2 * _FLOAT * own,
            "operator": at_once * kept.operator,
            "activations": (inputs if self.checkpointing else at_once * kept.rest) + head,
            "logits": 3 * _FLOAT * self.tokens * m.vocab_size,
            "block": kept.rest if self.checkpointing else 0,
        }

    def peak(self) -> int:
        """The most of :meth:`memory` that is there at once: logits, or a block that is computed once more."""
        memory = self.memory()
        once_more = memory["operator"] + memory["block"] if self.checkpointing else 0
        return sum(memory.values()) - min(memory["logits"], once_more)

    def flops(self) -> dict[str, int]:
        """FLOPs of all processes: :func:`hypermlp.budget.count_block_flops`, its backward, and the head's products.

        What is computed once more ends before a block's last product, which the backward does not need
        (``torch.utils.checkpoint``, early stop).
        """
        m = self.model
        size = (m.attention, m.intermediate_size, self.batch, self.seq_len)
        blocks = m.num_layers * count_block_flops(*size)
        tokens = self.batch * self.seq_len
        head = 2 * tokens * m.hidden_size * m.vocab_size
        last = 2 * tokens * m.hidden_size * m.intermediate_size
        return {
            "forward": blocks + head,
            "recomputed": blocks - m.num_layers * last if self.checkpointing else 0,
            "backward": m.num_layers * count_block_backward_flops(*size) + 2 * head,
        }

    def sent(self) -> dict[str, int]:
        """Bytes that one process sends, by rings where all send to all.

        - Weights: every pass gathers blocks for the forward and again for the backward, the root's group once.
        - Gradients: every pass sums and scatters them, in float32.
        - Heads and sequence: :func:`hypermlp.budget.count_heads_bytes` and ``count_sequence_bytes`` of every layer,
          forward, backward, and once more where blocks are recomputed.
        """
        m, mesh, e = self.part, self.mesh, self.itemsize
        whole, block = parameter_count(m), count_block_parameters(m.attention, m.intermediate_size)
        gathers = whole + m.num_layers * block
        own_length = self.seq_len // mesh.sequence
        heads = count_heads_bytes(m.attention, self.rows, own_length, itemsize=e, processes=mesh.heads)
        sequence = count_sequence_bytes(m.attention, self.rows, self.seq_len, itemsize=e, processes=mesh.sequence)
        layers = (3 if self.checkpointing else 2) * m.num_layers
        return {
            "weights": self.passes * ring_bytes(e * gathers, mesh.shards),
            "gradients": self.passes * ring_bytes(_FLOAT * whole, mesh.shards),
            "heads": self.passes * layers * heads,
            "sequence": self.passes * layers * sequence,
        }
