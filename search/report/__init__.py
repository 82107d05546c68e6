"""The results of a search as tables, charts and one HTML file.

Read `html` first, then `figures` (charts), `plans` (a plan as bars) and `costs` (numbers for people).
"""
