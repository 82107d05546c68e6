"""The record of a search in MLflow.

Read `record` first (the record of one search), then `searches` (finding and opening it), `search_run` and `trial_runs`
(writing), `reading`, `entries` (the names of metrics and tags), `store` (the connection), `moved` (a store whose
folder was moved), `lease` (one driver at a
time), `logged_models` and `registry` (the winners), `progress` and `changes` (of the spec).
"""
