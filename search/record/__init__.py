"""What a search leaves in MLflow.

Read `tracker` first (the runs of a search), then `searches` (where a search is found), `store` (the connection),
`entries` (the names of metrics), `logged_models`, `registry`, `lease` (one driver at a time), `progress` and `changes`.
"""
