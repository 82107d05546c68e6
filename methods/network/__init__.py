"""A network as rows, channel groups and a graph, and the cut.

Read `profile` first, which writes the `rows` and `groups`; then `counting`, `reading` (weights used past their layer),
`keeping` (the modules that a user protects), `coupling` (which channels go together), `proof` (by a trial cut),
`widths` (how narrow a group may get), `cut`, `graph` (a traced network) and `reach` (the error of a budget that no plan
meets). The room `attention` has to do with heads.
"""

from methods.network.counting import count_macs, count_params
from methods.network.groups import ChannelGroup
from methods.network.profile import profile
from methods.network.rows import Layer, Profile

__all__ = ["ChannelGroup", "Layer", "Profile", "count_macs", "count_params", "profile"]
