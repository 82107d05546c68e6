"""The teacher, the data and the user's own code.

Read `loading` first (a spec becomes a `Workload`), then `tasks`, the room `data`, `teacher`, `forms`, `outputs`,
`checkpoints` and `weight_files`, `zoo`, `usercode`, `judging` and `threads`.
"""

from search.workload.loading import Workload, load

__all__ = ["Workload", "load"]
