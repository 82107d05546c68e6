"""What is looked at on the cluster's head before a search is sent there: run on it as `python -P -m
search.service.probe`.

It opens the very stores the search would, and looks for the files its spec names: what is wrong is told before anything
was submitted, not when the first trial is to be recorded.
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
    """What the head must see for search `name`: `marks` put beside stores on the submitter's disk, the spec's `files`.

    Relative `files` are looked for in the job's folder, which is the spec's.
    """

    name: str
    marks: Sequence[str]
    files: Sequence[str]

    def to_text(self) -> str:
        """How it travels, in the variable `PROBE_VARIABLE`."""
        return json.dumps(asdict(self))


def main() -> None:
    """Looks; where something is wrong, prints what and exits with 2."""
    request = ProbeRequest(**json.loads(os.environ[PROBE_VARIABLE]))
    try:
        check(request, os.environ[URI_VARIABLE], os.environ[STUDIES_VARIABLE])
    except SearchError as error:
        print(f"{REFUSAL_PREFIX}{error}")
        sys.exit(WRONG_INPUT)


def check(request: ProbeRequest, uri: str, studies: str) -> None:
    """Looks for what is sought, and opens both stores.

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
