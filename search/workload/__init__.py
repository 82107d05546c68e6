"""The teacher, the data and the user's own code.

Read `loading` first (a spec becomes a `Workload`), then `teacher`, `forms`, `outputs`, `checkpoints` and
`weight_files`, `sources` (of images), `samples`, `pictures`, `splits`, `zoo`, `usercode` and `judging`.
"""

from search.workload.loading import Workload, load

__all__ = ["Workload", "load"]
