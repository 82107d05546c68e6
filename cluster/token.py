"""Keep secrets in files that no other user of this machine can read."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def keep_token() -> None:
    """Make sure that a Ray that this process starts next finds a token, unless it is not to ask for one.

    Ray itself would make one, in a file that every user of the machine can read. An existing token stays, and so does
    `RAY_AUTH_MODE=disabled`.
    """
    is_named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if is_named or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_once(path, secrets.token_hex(32))
    with suppress(PermissionError):  # another user owns it
        path.chmod(0o600)


def write_once(path: Path, secret: str) -> None:
    """Write a secret into a new file, for its owner alone; an existing file stays as it is."""
    with suppress(FileExistsError), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret)
