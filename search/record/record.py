"""The record of one search: an MLflow experiment with the search's run and a child run per trial.

The driver is the only writer. Everything a `SearchResult` needs is read back from here.
"""

from __future__ import annotations

import logging
from typing import Literal

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from search.record.reading import Reader
from search.record.registry import Registry
from search.record.search_run import SearchRun
from search.record.store import FAULTS, failing_fast
from search.record.trial_runs import TrialRuns

log = logging.getLogger(__name__)


class Record:
    """Writes through `search` and `trials`, reads through `read`; `registry` is the search's registered model."""

    def __init__(self, client: MlflowClient, experiment: str, run: Run) -> None:
        self.client = client
        self.search = SearchRun(client, run)
        self.trials = TrialRuns(client, experiment, self.search.run_id)
        self.registry = Registry(client, self.search.registered_model)
        self.read = Reader(client, experiment, self.search.run_id, self.registry)

    def resume(self) -> None:
        """Clear up after a killed driver: trials that never ended run again, so their runs are removed.

        Trials that ended and were deleted by hand come back.
        """
        self.search.reopen()
        self.trials.restore_deleted()
        self.trials.remove_unfinished()

    def halt(self, status: Literal["KILLED", "FAILED"]) -> None:
        """End every run that is still open with MLflow's `status`."""
        try:
            with failing_fast():
                self.trials.end_open(status)
                self.search.halt(status)
        except FAULTS as error:  # of a store that is gone: the error that led here is told, not this
            log.warning("runs are still open in MLflow: %s", error)
