"""Context parallelism: every process of a group has some of a sequence's tokens, and all of the model.

Of ``2 W`` chunks process ``r`` of ``W`` has the chunks ``r`` and ``2 W - 1 - r``: causal work is then the same on all.
Queries stay where they are; keys and values come to them, so that a row's ``z1``, ``rho`` and ``z2`` are complete
where it is computed, and nothing is approximated. Convolutions need the few tokens before each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hypermlp.checks import check_kind
from hypermlp.distributed.exchange import before_chunks, chunk_part, gathered, whole_of_parts
from hypermlp.distributed.groups import layers_to_shard, process_group
from hypermlp.layers import AttentionLayer
from hypermlp.layers.feature_mixing import Gates
from hypermlp.ops import checks
from hypermlp.ops.varlen import ALL_TOKENS, Tokens, sequence_origins, zero_padded


def shard_sequence(module: nn.Module, group: DeviceMesh | dist.ProcessGroup | None = None) -> None:
    """Let every attention layer of ``module`` work, from now on, on this process's rows of a sequence.

    All else in a model is done token by token, or must be made so: give it :func:`sequence_part` of the token ids,
    of masks and targets; ``cu_seqlens`` stays that of the whole. ``attention_mask`` is given on all processes or on
    none: padding on the right needs none. All processes of the group call it at once. The output is these rows'.

    The model's parameters must be the same on all processes, as DDP and FSDP keep them. Gradients of parameters
    are this process's part: those of the whole are the sum over the group. DDP and FSDP2 over these processes take
    the mean of it, which is right for a loss that is the mean over this process's own targets, if all have as many.

    Keys and values are gathered: ``qk_dim + v_dim`` numbers a token. Where the layer's window (``max_lag``) is not
    longer than a chunk and one token, the ``max_lag - 1`` tokens before each chunk come from its neighbours instead.

    Args:
        module: a causal attention layer, or a model that has some, such as a
            :class:`~hypermlp.models.LanguageModel` or one of the Hugging Face family.
        group: a one-dimensional device mesh or a process group; None for all processes.

    Raises:
        ValueError: for a layer that is bidirectional, of ``backend="triton"`` (whose kernels have no offset of
            queries), sharded already, or in a swapped model, which numbers its rows and makes its masks itself.
            Nothing is changed then.

    Example:
        >>> mesh = init_device_mesh("cuda", (dist.get_world_size(),))
        >>> shard_sequence(model, mesh)
        >>> logits = model(sequence_part(input_ids, mesh))
        >>> loss = next_token_loss(logits, sequence_part(targets, mesh))
    """
    group = process_group(group)
    layers = layers_to_shard(module)
    for path, layer in layers.items():
        name = path or type(layer).__name__
        if layer.over_processes is not None:
            raise ValueError(f"the sequence of {name} is sharded already")
        if not layer.config.causal:
            raise ValueError(f"{name} is bidirectional (causal=False): only causal layers take a sequence in parts")
        if layer.backend == "triton":
            raise ValueError(f"{name} has backend='triton', whose kernels have no offset of queries: take 'auto'")
        around = type(module.get_submodule(path.rpartition(".")[0]))
        if around.__module__.startswith("hypermlp.integrations"):
            raise ValueError(
                f"{name} stands in a swapped model, which numbers positions and makes masks for rows of its own: build "
                "a LanguageModel, or one of the Hugging Face family (hypermlp.models)"
            )
    for layer in layers.values():
        layer.over_processes = _Rows(group)


def sequence_part(x: Tensor, group: DeviceMesh | dist.ProcessGroup | None = None, dim: int = 1) -> Tensor:
    """This process's rows of a sequence that all have: ``[B, T, ...]`` to ``[B, T / W, ...]``.

    Args:
        x: tokens along ``dim``, a multiple of ``2 W`` of them.
        group: as of :func:`shard_sequence`.
        dim: the dimension of tokens.
    """
    check_kind("x", x, Tensor)
    group = process_group(group)
    chunks, length = 2 * group.size(), x.shape[dim]
    if length % chunks:
        raise ValueError(
            f"a sequence of {length} tokens does not divide into {chunks} chunks, two for each of {group.size()} "
            f"processes: pad it on the right to {-(-length // chunks) * chunks}, with attention_mask 0 (and targets "
            "-100) there; tokens after the last bound of cu_seqlens are padding already"
        )
    return chunk_part(x, group.rank(), group.size(), dim)


def sequence_whole(y: Tensor, group: DeviceMesh | dist.ProcessGroup | None = None, dim: int = 1) -> Tensor:
    """The sequence of which every process has its rows, ``[B, T / W, ...]`` to ``[B, T, ...]``, in order, on all.

    A collective call. Its gradient is this process's rows of the whole's: all are to compute the same from it.
    """
    check_kind("y", y, Tensor)
    return whole_of_parts(y.movedim(dim, 1), process_group(group)).movedim(1, dim)


@dataclass(frozen=True)
class _Rows:
    """What a layer does with this process's rows. A copy of the layer, such as a moving average, shares the group."""

    group: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rows:
        return self

    def __call__(
        self, layer: AttentionLayer, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """:meth:`AttentionLayer.forward` of ``[B, 2 c, hidden_size]``, the mask that of these rows, bounds of all."""
        layer.check_input(hidden_states)
        tokens, rows = self._tokens(hidden_states, attention_mask, cu_seqlens), self._place(layer, hidden_states)
        kept = rows.kept(tokens)
        x = zero_padded(hidden_states, kept)
        gates = layer.gates(x)
        q = layer.queries(x, gates, rows.offset(layer, rows.positions(), tokens, x.shape[0]))
        k, v = self._keys_values(layer, x, tokens, rows)
        parts = self._keys_of_chunks(layer, k, v, rows)
        o = []
        for index, (start, chunk_k, chunk_v) in enumerate(parts):
            own = slice(index * rows.size, (index + 1) * rows.size)
            chunk_gates = Gates(*(None if gate is None else gate[:, own] for gate in gates))
            o.append(layer.attend(q[:, own], chunk_k, chunk_v, chunk_gates, _cut(tokens, start, chunk_k.shape[1])))
        return zero_padded(layer.output(rearrange(torch.cat(o, 1), "b t h v -> b t (h v)"), gates), kept)

    def _tokens(self, x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
        """Who is there of the whole sequence, checked as at every door."""
        if attention_mask is None and cu_seqlens is None:
            return ALL_TOKENS
        whole = x.new_empty(x.shape[0], 1, 0).expand(-1, x.shape[1] * self.group.size(), -1)
        valid = None
        if attention_mask is not None:
            own = checks.check_attention_mask(attention_mask, x)
            valid = gathered(own.to(torch.uint8), self.group) != 0
        return checks.tokens(whole, valid, cu_seqlens)

    def _place(self, layer: AttentionLayer, x: Tensor) -> _Place:
        length, reach = x.shape[1], layer.config.conv_size - 1
        if length % 2:
            raise ValueError(f"hidden_states has {length} tokens, and sequence_part gives two chunks of as many each")
        if length // 2 < max(reach, 1):
            raise ValueError(
                f"chunks of {length // 2} tokens are shorter than the convolutions' reach of {reach}: take longer "
                "sequences or fewer processes"
            )
        return _Place(self.group.rank(), self.group.size(), length // 2, x.device)

    def _keys_values(self, layer: AttentionLayer, x: Tensor, tokens: Tokens, rows: _Place) -> tuple[Tensor, Tensor]:
        """Those of these rows; convolutions see the tokens before each chunk."""
        reach = max(layer.config.conv_size - 1, 0)
        wide = before_chunks(x, reach, self.group).flatten(1, 2)
        positions = rows.positions(reach)
        bounds = None
        if tokens.cu_seqlens is not None:
            size = reach + rows.size
            bounds = torch.cat(
                [(tokens.cu_seqlens - (start - reach)).clamp(0, size) + n * size for n, start in enumerate(rows.starts)]
            )
        valid = None if tokens.valid is None else tokens.valid[:, positions.clamp_min(0)]
        offset = rows.offset(layer, positions, tokens, x.shape[0])
        k, v = (
            rearrange(y, "b (two c) ... -> b two c ...", two=2)[:, :, reach:].flatten(1, 2)
            for y in layer.keys_values(wide, Tokens(valid, bounds), offset)
        )
        return k, v

    def _keys_of_chunks(
        self, layer: AttentionLayer, k: Tensor, v: Tensor, rows: _Place
    ) -> list[tuple[int, Tensor, Tensor]]:
        """For each of the two chunks the keys and values that its queries see, and the position of the first."""
        config, size = layer.config, rows.size
        reach = config.max_lag - 1 if config.layout == "lag" and config.max_lag is not None else None
        firsts = [0 if reach is None else max(start - reach, 0) for start in rows.starts]
        both = torch.cat((k.flatten(2), v.flatten(2)), dim=-1)  # of one width, so one message
        if reach is not None and reach <= size:
            wide = before_chunks(both, reach, self.group)
            # nothing is before the first chunk
            seen = [wide[:, n, 0 if start else reach :] for n, start in enumerate(rows.starts)]
        else:
            whole = gathered(both, self.group)
            seen = [whole[:, first : start + size] for first, start in zip(firsts, rows.starts, strict=True)]
        found = []
        for first, part in zip(firsts, seen, strict=True):
            part_k, part_v = part.split_with_sizes((k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]), dim=-1)
            found.append(
                (first, rearrange(part_k, "b t (h k) -> b t h k", h=k.shape[2]),
                 rearrange(part_v, "b t (h v) -> b t h v", h=v.shape[2]))
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class _Place:
    """Where this process's two chunks of ``size`` tokens lie in the sequence."""

    rank: int
    world: int
    size: int
    device: torch.device

    @property
    def starts(self) -> tuple[int, int]:
        return self.rank * self.size, (2 * self.world - 1 - self.rank) * self.size

    def positions(self, reach: int = 0) -> Tensor:
        """Of both chunks, each with ``reach`` tokens before it, ``[2 (reach + size)]``; negative before the first."""
        steps = torch.arange(-reach, self.size, device=self.device)
        return torch.cat([start + steps for start in self.starts])

    def kept(self, tokens: Tokens) -> Tensor | None:
        """Which of the own rows are no padding, bool ``[B or 1, 2 c]``; None: all."""
        kept = tokens.kept(2 * self.world * self.size, self.device)
        return None if kept is None else kept[:, self.positions()]

    def offset(self, layer: AttentionLayer, positions: Tensor, tokens: Tokens, batch: int) -> int | Tensor:
        """What a rotation adds to rows counted from 0: angles count from each sequence's first valid token."""
        if not layer.config.rope:
            return 0
        if not tokens.one_sequence_a_row:
            origins = sequence_origins(tokens, batch, 2 * self.world * self.size, self.device)
            positions = positions - origins[:, positions.clamp_min(0)]
        return positions - torch.arange(positions.shape[-1], device=self.device)


def _cut(tokens: Tokens, start: int, length: int) -> Tokens:
    """Who is there of ``length`` tokens from ``start`` on."""
    valid, bounds = tokens
    return Tokens(
        None if valid is None else valid[:, start : start + length],
        None if bounds is None else (bounds - start).clamp(0, length),
    )
