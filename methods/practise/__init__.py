"""PRACTISE: residual blocks dropped by how well a light repair makes up for them.

Read `method` first, then `blocks` (which may go), `recoverability` (what each costs) and `selection` (the cheapest
set).
"""

from methods.practise.blocks import removable_blocks
from methods.practise.method import PRACTISE
from methods.practise.selection import select

__all__ = ["PRACTISE", "removable_blocks", "select"]
