"""What the metadata of a search's job holds, for whoever lists jobs: it imports next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster import Job

URI_VARIABLE, STUDIES_VARIABLE = "PAREDOWN_URI", "PAREDOWN_STUDIES"
"""The environment variables that name the stores of a search, for the command and for its jobs."""
RESUME_VARIABLE = "PAREDOWN_AGAIN"
"""The environment variable that tells a job the command that resumes it, to print when the job is stopped."""

NAME, DIGEST, URI = "paredown.search", "paredown.digest", "paredown.uri"
"""The search's name, a hash of what decides it, and the store where it is recorded."""


def search_of(job: Job) -> str | None:
    """The name of a job's search; None for a job that is none."""
    return job.metadata.get(NAME)
