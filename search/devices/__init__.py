"""How fast a network runs on a device: measured or predicted.

Read `stopwatch` first, then `device` (the protocol), `measured` and `predicted`, `layer_table`, `programs` (what a
device runs) and `measure` (the command).
"""
