"""The names of variables and metadata that a search's job carries; a list of jobs needs to import no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster import Job

URI_VARIABLE, STUDIES_VARIABLE = "PAREDOWN_URI", "PAREDOWN_STUDIES"
"""The environment variables that name the stores of a search, for the command and for its jobs."""
RESUME_VARIABLE = "PAREDOWN_AGAIN"
"""The environment variable that tells a job the command that resumes it, to print when the job is stopped."""

NAME, DIGEST, URI = "paredown.search", "paredown.digest", "paredown.uri"
"""The metadata of a job: its search's name, a hash of all that decides the search, and the store of its record."""


def search_of(job: Job) -> str | None:
    """The name of a job's search, or None if the job is no search."""
    return job.metadata.get(NAME)
