"""PRACTISE: residual blocks are dropped, those first for which a light repair makes up.

Read `method` first, then `blocks` (those that may go), `recoverability` (the error of dropping them) and `selection`
(the cheapest set).
"""

from methods.practise.blocks import removable_blocks
from methods.practise.method import PRACTISE
from methods.practise.selection import select

__all__ = ["PRACTISE", "removable_blocks", "select"]
