"""ITPruner: layer importance from nHSIC, and the widths that it buys within a budget.

Read `method` first, then `hsic` (scores), `path` (widths for every budget), `elimination` (the search behind it) and
`relaxation` (a proven bound).
"""

from methods.itpruner.method import ITPruner, importance, redundancy

__all__ = ["ITPruner", "importance", "redundancy"]
