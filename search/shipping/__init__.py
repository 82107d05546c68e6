"""A registered model as a folder that one ships.

Read `ship` first (the files, checked against each other), then `card` (what the folder says of its model, as data) and
`page` (the same for people).
"""
