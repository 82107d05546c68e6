"""What `make setup` prints of each step, in a folder with a space in its name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.test_architecture import ROOT


def make(folder: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    """Run a makefile of these steps as ours runs its own."""
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "step", folder / ".ci")
    step = re.search(r"^STEP := .*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert step is not None
    (folder / "Makefile").write_text("\n\t".join([f"{step[0]}\nsetup:", *(f"@$(STEP) {one}" for one in steps)]) + "\n")
    ours = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # `make test` sets its own
    return subprocess.run(["make", "setup"], cwd=folder, env=ours, capture_output=True, text=True, timeout=60)


def test_a_step_is_a_line_with_its_seconds(tmp_path: Path) -> None:
    done = make(tmp_path / "a folder", '"two words" echo loud', '"both ways" sh -c \'no-such-tool || touch "it ran"\'')
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"two words +\d+ s\nboth ways +\d+ s\n", done.stdout)
    assert (tmp_path / "a folder" / "it ran").exists()


def test_a_step_that_fails_shows_its_log_and_is_the_last(tmp_path: Path) -> None:
    done = make(tmp_path / "a folder", "\"trouble\" sh -c 'echo part one; echo part two >&2; exit 3'", "later echo no")
    assert done.returncode == 2  # make's own
    assert re.fullmatch(r"trouble +failed after \d+ s; it said:\npart one\npart two\n", done.stdout)
    assert "Error 3" in done.stderr


def test_no_step_of_ours_prints_more() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^\$\(INSTALLED\):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    assert all(line.startswith(("\t@$(STEP) ", "\t@touch ")) for line in recipe[1].splitlines())
