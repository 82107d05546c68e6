"""The commit of a spec's folder, which a registered version is tagged with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from search.driver.winners import commit


def test_the_commit_a_spec_is_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(str(tmp_path)) is None
    git("init", "--quiet")
    assert commit(str(tmp_path)) is None
    (tmp_path / "spec.yaml").write_text("name: digits\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "begin")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    (tmp_path / "notes").write_text("what git does not know of changes no commit")
    assert commit(str(tmp_path)) == head
    (tmp_path / "spec.yaml").write_text("name: others\n")
    assert commit(str(tmp_path)) == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(str(tmp_path)) is None
