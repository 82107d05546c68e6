"""The command `paredown`.

Read `main` first, then `jobs` (submit, status, logs, stop), `serve` and `console` (the terminal).
"""
