"""The search: spec, loop, Optuna, MLflow, frontier, report and command line.

MLflow decides while it is imported whether to report home, so it is told here, before anything of this package runs.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
