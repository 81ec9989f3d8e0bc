"""DéjàVuLib: KV-cache layouts, pools, and the primitives that stream them. See docs/dejavulib.md.

Each name is imported with its first use, so that planning with layouts alone needs neither carriers nor devices.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dejavu.kv.handle import Handle
    from dejavu.kv.layout import PoolLayout, RowMap, Window
    from dejavu.kv.packing import Packing, pack
    from dejavu.kv.plan import Plan, Resharding
    from dejavu.kv.pool import KVPool, Landing
    from dejavu.kv.side import CacheSide, RankCache, Selection
    from dejavu.kv.steps import StepStreamer
    from dejavu.kv.stream import (
        LayerStreamer,
        Level,
        fetch,
        flush,
        gather,
        message_key,
        scatter,
        stream_in,
        stream_out,
    )

__all__ = [
    "CacheSide",
    "Handle",
    "KVPool",
    "Landing",
    "LayerStreamer",
    "Level",
    "Packing",
    "Plan",
    "PoolLayout",
    "RankCache",
    "Resharding",
    "RowMap",
    "Selection",
    "StepStreamer",
    "Window",
    "fetch",
    "flush",
    "gather",
    "message_key",
    "pack",
    "scatter",
    "stream_in",
    "stream_out",
]

_HOMES = {
    "handle": "Handle",
    "layout": "PoolLayout RowMap Window",
    "packing": "Packing pack",
    "plan": "Plan Resharding",
    "pool": "KVPool Landing",
    "side": "CacheSide RankCache Selection",
    "steps": "StepStreamer",
    "stream": "LayerStreamer Level fetch flush gather message_key scatter stream_in stream_out",
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
