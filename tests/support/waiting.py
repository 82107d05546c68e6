"""Wait for something real to happen, for no longer than a busy machine may need."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 240


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> None:
    """Wait until a condition holds; if a process is given, it must stay at work meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
