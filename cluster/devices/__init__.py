"""Measure how fast a network runs: the meter, the runtimes, single layers, the roofline.

Read `meter` first, then `runtimes`, `layers` and `roofline` (a device that is not there).
"""
