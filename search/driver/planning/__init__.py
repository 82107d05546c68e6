"""Plans that meet every limit that can be known before training.

Read `planner` first (scores, and the plans made of them), then `shares` (a chain's shares, tried), `sizing` (limits on
stored bytes), `fitting` (limits on latency) and `bracket` (its arithmetic).
"""
