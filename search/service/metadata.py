"""What the metadata of a search's job holds, for whoever lists jobs: it imports next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster import Job

NAME, DIGEST, URI = "paredown.search", "paredown.digest", "paredown.uri"
"""The search's name, a hash of what decides it, and the store where it is recorded."""


def search_of(job: Job) -> str | None:
    """The name of a job's search; None for a job that is none."""
    return job.metadata.get(NAME)
