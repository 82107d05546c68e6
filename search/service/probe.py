"""Check the cluster's head before a search is sent there; runs on it as `python -P -m search.service.probe`.

It opens the very stores that the search would, and looks for the files that its spec names, so that a mistake is
reported before the search is submitted, not when its first trial is to be recorded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from search.base import WRONG_INPUT, SearchError
from search.service.metadata import STUDIES_VARIABLE, URI_VARIABLE

REFUSAL_PREFIX = "paredown: "
PROBE_VARIABLE = "PAREDOWN_PROBE"


@dataclass(frozen=True)
class ProbeRequest:
    """The files that the head must see for search `name`: `marks` beside stores on the submitter's disk, and `files`.

    `files` are those that the spec names; relative ones lie in the job's folder, which is the spec's.
    """

    name: str
    marks: Sequence[str]
    files: Sequence[str]

    def to_text(self) -> str:
        """Write the request as the text of the variable `PROBE_VARIABLE`."""
        return json.dumps(asdict(self))


def main() -> None:
    """Check the head; print a reason and exit with 2 if the search cannot run there."""
    request = ProbeRequest(**json.loads(os.environ[PROBE_VARIABLE]))
    try:
        check(request, os.environ[URI_VARIABLE], os.environ[STUDIES_VARIABLE])
    except SearchError as error:
        print(f"{REFUSAL_PREFIX}{error}")
        sys.exit(WRONG_INPUT)


def check(request: ProbeRequest, uri: str, studies: str) -> None:
    """Look for the requested files, and open both stores.

    Raises:
        SearchError: this machine is not the submitter's, but stores lie on that one's disk; or a file is missing; or a
            store cannot be used.
    """
    for mark in request.marks:
        if not Path(mark).exists():
            raise SearchError(
                f"the cluster's head does not see the folder {Path(mark).parent}, to which a relative tracking.uri or "
                "tracking.studies refers here; expected stores that the head can reach; give --uri of an MLflow server "
                "and --studies of a database, or absolute paths on a disk that both share"
            )
    for file in request.files:
        if not Path(file).expanduser().exists():
            raise SearchError(
                f"{file!r}, which the spec names, is not on the cluster's head; expected it in the spec's folder as it "
                "was sent, or at that path there; take it out of .gitignore and .rayignore, or correct the path"
            )
    from search.driver.study import storage
    from search.record.store import check_artifacts, check_store

    check_store(uri)
    check_artifacts(uri, request.name)
    try:
        storage(studies)
    except OSError as error:
        raise SearchError(
            f"cannot use tracking.studies {studies}: {error.strerror}; expected a file that may be written, or a "
            "database URL; correct it"
        ) from error


if __name__ == "__main__":
    main()
