"""What attention layers do over a text: their maps, and numbers of them by head, by lag and by rank."""

from hypermlp.inspect.maps import HeadMaps, head_maps
from hypermlp.inspect.record import LayerCall, record
from hypermlp.inspect.statistics import (
    MixResponse,
    NegativeShare,
    RankUse,
    Reach,
    active_share,
    active_share_by_distance,
    mix_responses,
    negative_share,
    rank_use,
    reach,
)

__all__ = [
    "HeadMaps",
    "LayerCall",
    "MixResponse",
    "NegativeShare",
    "RankUse",
    "Reach",
    "active_share",
    "active_share_by_distance",
    "head_maps",
    "mix_responses",
    "negative_share",
    "rank_use",
    "reach",
    "record",
]
