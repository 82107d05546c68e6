"""The one training loop of every method.

Read `recipe` first (the words), then `objective` (losses), `evaluation` (top-1, batch norms), `loop` and `distributed`
(a step that processes share).
"""
