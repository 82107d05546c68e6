"""A network as rows, channel groups and a graph, and how it is cut.

Read `profile` first (one row per layer), then `groups`, `coupling` (which channels go together), `widths` (how narrow a
group may get), `graph` (a traced network) and `cut`.
"""

from methods.network.groups import ChannelGroup
from methods.network.profile import Layer, Profile, count_macs, count_params, profile

__all__ = ["ChannelGroup", "Layer", "Profile", "count_macs", "count_params", "profile"]
