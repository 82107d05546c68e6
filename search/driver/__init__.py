"""The search itself.

Read `loop` first, then in the order of the story `prepare`, `planning` (scores, and plans within every limit), `study`
(Optuna), `exploring` (what is worth training), `runner` with `ledger` and `account`, and `winners`; `preflight` and
`compress` are its short forms.
"""
