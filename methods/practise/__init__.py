"""PRACTISE: residual blocks dropped by how well a light repair makes up for them.

Read `method` first, then `blocks` (which may go), `recoverability` (what each costs) and `selection` (the cheapest
set).
"""
