"""Run a gated network so that closed channels cost nothing.

Read `build` first (a gated network made executable), then `parts` (its modules) and `buckets` (inputs of alike gates
together).
"""
