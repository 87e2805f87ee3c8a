"""The cache of a model: what its layers remember of the tokens so far, in bounded memory.

A token leaves its keys (``qk_dim`` numbers a layer), its values (``v_dim``) and the hidden state that
the next tokens' convolutions read (``hidden_size``), of which all but a few go once the window of
``max_lag`` tokens is full: a stream of any length runs in constant memory.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypermlp.cache.layer import LayerCache
from hypermlp.cache.spec import CacheSpec
from hypermlp.cache.static import StaticLayerCache
from hypermlp.checks import as_flag, as_integer, check_kind, did_you_mean

_KEY = re.compile(r"layers\.(\d+)\.(.+)")

Part = LayerCache | StaticLayerCache
"""One layer's part of a :class:`HyperCache`: of one that grows, or of a static one.

A layer has it by its ``cache_part``, and takes it as its ``cache``, in the place of the whole.
"""


class HyperCache:
    """One cache for all layers of a model, passed to each of them as ``cache=``.

    Layers make their parts when they first see it. Rows of a batch may have prompts of different
    lengths, padded on the left; after a prompt padded on the right, :meth:`crop` to the prompts'
    lengths before going on.

    Args:
        max_crop: newest tokens that :meth:`crop` can drop once a window is full, and any number before. It costs
            that many tokens of memory, and until then all hidden states. 0: none are dropped, at no cost.
        max_length: tokens it takes at most; None for no limit.
        static: memory of one size from the start, for ``torch.compile`` and CUDA graphs; needs
            ``max_length``.

    Example:
        >>> cache = HyperCache()
        >>> with torch.no_grad():
        ...     prompt = layer(hidden_states, cache=cache)
        ...     following = layer(next_hidden_state, cache=cache)
    """

    def __init__(self, *, max_crop: int = 64, max_length: int | None = None, static: bool = False) -> None:
        max_crop = as_integer("max_crop", max_crop, 0)
        max_length = None if max_length is None else as_integer("max_length", max_length, 1)
        static = as_flag("static", static)
        if static and max_length is None:
            raise ValueError("a static cache needs max_length: its memory is made once")
        self.max_crop, self.max_length, self.static = max_crop, max_length, static
        self.layers: dict[int, Part] = {}
        # whose each part is, and which was used last: known again at the next call of a copy, so not copied or saved
        self._owners: dict[int, weakref.ref[object]] = {}
        self._latest: Part | None = None

    def layer(self, layer_idx: int | None, spec: CacheSpec) -> Part:
        """The part of layer ``layer_idx``, made at first use; an error if another layer made it."""
        if layer_idx is None:
            raise ValueError("cache= needs layer_idx: build each layer with its place in the model")
        if layer_idx not in self.layers:
            as_integer("layer_idx", layer_idx, 0)
            self.layers[layer_idx] = self._new(spec)
        found = self.layers[layer_idx]
        if found.spec is not spec and found.spec != spec:
            raise ValueError(f"the cache's layer {layer_idx} was filled by another layer: {found.spec}, not {spec}")
        return found

    def take_turn(self, layer: object, layer_idx: int | None, part: Part, new: int | None) -> None:
        """Whether ``part`` is ``layer``'s to take in ``new`` tokens now; None for as many as are valid.

        In a step every layer takes in the same tokens once. Compiled code goes unchecked: it may not read lengths.

        Raises:
            ValueError: if another layer uses that part, or it is not this layer's turn: it has been called in
                this step, or the others have seen other tokens.
        """
        length = part.known_length
        if torch.compiler.is_compiling() or layer_idx is None or length is None:
            return
        owner = self._owners.get(layer_idx)
        if owner is None or owner() is not layer:
            self._check_owner(owner, part, layer_idx)
            self._owners[layer_idx] = weakref.ref(layer)
        if len(self.layers) > 1:
            latest = self._latest
            if new is not None and (latest is None or length + new != latest.length):
                self._check_turn(length, layer_idx, new)
            self._latest = part

    @staticmethod
    def _check_owner(owner: weakref.ref[object] | None, part: Part, layer_idx: int) -> None:
        if owner is not None and owner() is not None and not part.empty:
            raise ValueError(
                f"the cache's layer {layer_idx} was filled by another layer of that layer_idx: give every layer of "
                "a model its own; to go on with a copy of the model, cache.load_state_dict(cache.state_dict(), specs)"
            )

    def _check_turn(self, length: int, layer_idx: int, new: int) -> None:
        lengths = [other.length for other in self.layers.values() if not other.empty]
        if not lengths or length + new == max(lengths) or all(other == length for other in lengths):
            return
        raise ValueError(
            f"layer {layer_idx} is called out of turn: its part of the cache holds {length} tokens, {new} are to come, "
            f"and other layers hold {sorted(set(lengths))}. With one cache every layer takes in a step's tokens once: "
            "give each place of layers that share weights, and layers that see other tokens, a cache of their own"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_owners": {}, "_latest": None}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What models of transformers ask for, before any layer is called, and what is misspelt."""
            if torch.compiler.is_compiling():
                raise AttributeError(name)  # the compiler does not follow the rest
            if hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property's own error
            for_layers = (
                "it is for layers and LanguageModel. Models of transformers, swapped ones too, take transformers' "
                "caches: DynamicCache(config=model.config)"
            )
            near = did_you_mean(name, [known for known in dir(type(self)) if not known.startswith("_")])
            raise AttributeError(f"HyperCache has no {name!r}: {near or for_layers}")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.layers[layer_idx].length if layer_idx in self.layers else 0

    @property
    def lengths(self) -> Tensor | None:
        """Tokens each row has from its first valid one, ``[B]`` int64; None while empty."""
        return next((layer.lengths for layer in self.layers.values() if layer.length), None)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(layer.nbytes for layer in self.layers.values())

    def crop(self, lengths: int | Tensor) -> None:
        """Keep the first ``lengths`` tokens, as if the later ones had never come.

        Args:
            lengths: an integer counts the batch's tokens, padding included, and a negative one
                how many to drop; a tensor ``[B]`` counts each row's from its first valid one.
        """
        if isinstance(lengths, Tensor):
            _check_integers("lengths", lengths)
        elif isinstance(lengths, (list, tuple)):
            raise TypeError(f"lengths, one a row, must be a tensor: crop(torch.tensor({list(lengths)}))")
        else:
            lengths = as_integer("lengths", lengths)
        dropped = isinstance(lengths, int) and lengths < 0
        wanted = [(layer, layer.length + lengths if dropped else lengths) for layer in self.layers.values()]
        for layer, kept in wanted:  # all can, or none does
            layer.check_crop(kept)
        for layer, kept in wanted:
            layer.crop(kept)

    def reorder(self, indices: Tensor) -> None:
        """Row ``b`` becomes what row ``indices[b]`` was (beam search); ``[B]`` int64."""
        self.select(indices)

    def select(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` ``[B']`` int64, in that order; a row may come more than once."""
        _check_integers("indices", indices)
        for layer in self.layers.values():
            layer.map(lambda x: x.index_select(0, indices.to(x.device)))

    def repeat(self, times: int) -> None:
        """Every row ``times`` times, copies side by side (several samples per prompt)."""
        times = as_integer("times", times, 1)
        for layer in self.layers.values():
            layer.map(lambda x: x.repeat_interleave(times, dim=0))

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        for layer in self.layers.values():
            layer.reset()

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> HyperCache:
        """Move to ``device``, and floating-point parts to ``dtype``; ``to(dtype)`` alone will do. Returns the cache."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"to takes one dtype, got {device} and {dtype}")
            device, dtype = None, device
        if dtype is not None:
            check_kind("dtype", dtype, torch.dtype)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(
                f"dtype must be a floating-point one, got {dtype}: keys and values would lose what they say"
            )
        for layer in self.layers.values():
            layer.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of everything remembered, as flat tensors that safetensors can store."""
        return {
            f"layers.{index}.{name}": tensor
            for index, layer in self.layers.items()
            for name, tensor in layer.saved().items()
        }

    def load_state_dict(self, state_dict: dict[str, Tensor], specs: dict[int, CacheSpec]) -> None:
        """Take back what :meth:`state_dict` gave.

        Args:
            state_dict: tensors by name.
            specs: sizes of each layer's part, ``{layer_idx: CacheSpec.of(layer.config)}``.

        Raises:
            ValueError: the tensors do not fit ``specs`` or each other; the cache is as it was.
        """
        if not isinstance(specs, Mapping) or not all(isinstance(spec, CacheSpec) for spec in specs.values()):
            raise TypeError("specs must be a CacheSpec of each layer: {layer.layer_idx: CacheSpec.of(layer.config)}")
        check_kind("state_dict", state_dict, Mapping, "what cache.state_dict() gave")
        parts: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state_dict.items():
            found = _KEY.fullmatch(key)
            if found is None or not isinstance(tensor, Tensor):
                raise ValueError(
                    f"state_dict must hold tensors layers.INDEX.NAME, got {key!r}: {type(tensor).__name__}"
                )
            parts.setdefault(int(found[1]), {})[found[2]] = tensor
        if set(parts) - set(specs):
            raise ValueError(f"state_dict has layers {sorted(parts)} and specs only {sorted(specs)}")
        layers = {layer_idx: self._new(specs[layer_idx]) for layer_idx in parts}
        for layer_idx, tensors in parts.items():
            layers[layer_idx].load(tensors)
        self.layers, self._owners, self._latest = layers, {}, None

    def _new(self, spec: CacheSpec) -> Part:
        if self.static and self.max_length is not None:
            return StaticLayerCache(spec, self.max_length)
        return LayerCache(spec, self.max_crop, self.max_length)

    def __repr__(self) -> str:
        lengths: Any = None if self.lengths is None else self.lengths.tolist()
        return f"HyperCache(layers={len(self.layers)}, lengths={lengths}, nbytes={self.nbytes}, static={self.static})"


def _check_integers(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32) or values.ndim != 1:
        raise TypeError(f"{name} must be an int64 or int32 tensor [batch], got {values!r}")
