"""The search itself.

Read `loop` first, then in the order of the story `prepare`, `planner` (scores and plans), `fitting` with `bracket` and
`sizing` (plans within every limit), `study` (Optuna), `runner` with `ledger` and `account`, and `winners`; `preflight`
and `compress` are its short forms.
"""
