"""The search itself.

Read `loop` first, then in the order of the story: `prepare`, `planner`, `fitting` with `bracket`, `study`, `runner`,
`winners`; and its short forms `preflight` (`paredown check`) and `compress`.
"""
