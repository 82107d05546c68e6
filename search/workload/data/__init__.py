"""Images and labels: where they come from, how they are prepared, and how they are split.

Read `samples` first, then `labels`, `sources` and `folders`, `pictures` and `splits`.
"""
