"""The MLflow store: what cannot be used is told before anything costs time."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.base import SearchError, TrackingError
from search.cache import alone
from search.tracking import check_store, find_search


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    Path("notes.txt").write_text("not a database, but long enough to be looked at as one. " * 50)
    with pytest.raises(TrackingError, match="cannot use the MLflow store"):
        check_store("sqlite:///notes.txt")


def test_a_missing_driver_is_told_without_the_password() -> None:
    with pytest.raises(TrackingError) as caught:
        check_store("nosuchdatabase://user:secret@localhost/db")
    assert "secret" not in str(caught.value)


def test_a_search_nobody_ran() -> None:
    with pytest.raises(TrackingError, match="run a search first"):
        find_search("sqlite:///paredown.db", "digits")
    check_store("sqlite:///paredown.db")
    with pytest.raises(TrackingError, match="no search 'digits'"):
        find_search("sqlite:///paredown.db", "digits")


def test_one_driver_per_search() -> None:
    with alone("a search"), pytest.raises(SearchError, match="running already"), alone("a search"):
        pass
    with alone("a search"):
        pass
