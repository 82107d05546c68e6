"""A network as rows, channel groups and a graph, and the cut.

Read `profile` first (one row per layer), then `groups`, `coupling` (which channels go together), `widths` (how narrow a
group may get), `cut`, `graph` (a traced network) and `reach` (the error of a budget that no plan meets).
"""

from methods.network.groups import ChannelGroup
from methods.network.profile import Layer, Profile, count_macs, count_params, profile

__all__ = ["ChannelGroup", "Layer", "Profile", "count_macs", "count_params", "profile"]
