"""What the layers of a model remember of the tokens so far."""

from hypermlp.cache.hyper_cache import HyperCache, Part
from hypermlp.cache.layer import LayerCache
from hypermlp.cache.spec import CacheSpec
from hypermlp.cache.static import StaticLayerCache

__all__ = ["CacheSpec", "HyperCache", "LayerCache", "Part", "StaticLayerCache"]
