"""The command `paredown`.

Read `main` first, then `init`, `jobs` (submit, status, logs, stop, list), `serve`, `options` (shared by commands),
`console` (tables and progress) and `output` (JSON, errors, exit codes).
"""
