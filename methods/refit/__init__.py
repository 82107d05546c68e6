"""What calibration images tell of a network without any training: which channels to remove, and better weights.

Read `moments` first (rows and second moments of what layers read), then `fit` (a student's weights, in order, to its
teacher's outputs), `removal` (the order in which channels go, and the error of every width), `narrow` (a student of
fewer channels, by both) and `bundles` (work put together to shards).
"""

from methods.refit.fit import refit

__all__ = ["refit"]
