"""Measure or predict how fast a network runs on a device.

Read `stopwatch` first, then `device` (the protocol) and its two kinds: `measured`, with `meter`, `readings` (kept on
disk) and `layer_table`, and `predicted`; then `programs` (the networks that devices run) and `measure` (the command).
"""
