"""The ledger of a search: every trial that ended, before this sitting or in it, and what may be reused of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from search.base import SearchError
from search.frontier import beats
from search.trials import Candidate, Proposal


class Ledger:
    """Holds the trials that ended by budget and number.

    Args:
        ended: those on record.
        works: the run that trained each plan and recipe to the end.
    """

    def __init__(self, ended: Iterable[Candidate], works: Mapping[str, str]) -> None:
        self.results: dict[tuple[str, int], Candidate] = {}
        self.works = dict(works)
        self._unbeaten: list[Candidate] = []
        for candidate in ended:
            self.add(candidate)

    def add(self, found: Candidate) -> None:
        """Take in a trial that ended."""
        self.results[found.budget, found.trial] = found
        if found.is_model and not self.is_beaten(found):
            self._unbeaten = [*(one for one in self._unbeaten if not beats(found, one)), found]

    def is_beaten(self, found: Candidate) -> bool:
        """Whether some trial leaves this one no budget to win and no frontier to stand on.

        Only unbeaten trials are looked at: a trial that any other beats is beaten by one of these.
        """
        return any(beats(one, found) for one in self._unbeaten)

    def knows(self, proposal: Proposal) -> bool:
        """Whether the trial of a proposal has ended.

        Raises:
            SearchError: the record is of another proposal of that number, so the studies are not the record's.
        """
        found = self.results.get(proposal.key)
        if found is None:
            return False
        asked = proposal.method, dict(proposal.knobs) | {f"recovery.{key}": v for key, v in proposal.recovery.items()}
        if (found.method, dict(found.knobs)) != asked:
            raise SearchError(
                f"trial {proposal.number} of budget {proposal.budget!r} is on record as {found.method}, but Optuna "
                f"proposes {proposal.method} or other knobs for it; expected the studies this search began with; give "
                "their place as tracking.studies, or run the search under another name with --fork"
            )
        return True
