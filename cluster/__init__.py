"""Work on other processes: run functions on workers beside loaded data, and measure devices. Knows no method's name.

Read `base` first (the two verbs and their events), then `inline` (in this process); on Ray `workers` (one process),
`pool` (many), `groups` (several for one item) and `ray_cluster` (all of it). `devices` measures. `jobs` submits
commands, `head` starts a Ray of our own, `serve` answers HTTP behind `front`, and `token` keeps its secrets.
"""

from cluster.base import Cluster, ClusterError, Done, Event, Failed, Item, Step, Stopped, always
from cluster.devices.layers import LayerShape, layer_times
from cluster.devices.meter import Latency, Reading, identity, interleaved, measure
from cluster.devices.roofline import Roofline, predicted_ms, roofline
from cluster.devices.runtimes import Program, Runtime
from cluster.inline import InlineCluster
from cluster.jobs import Job, Jobs
from cluster.ray_cluster import RayCluster

__all__ = [
    "Cluster",
    "ClusterError",
    "Done",
    "Event",
    "Failed",
    "InlineCluster",
    "Item",
    "Job",
    "Jobs",
    "Latency",
    "LayerShape",
    "Program",
    "RayCluster",
    "Reading",
    "Roofline",
    "Runtime",
    "Step",
    "Stopped",
    "always",
    "identity",
    "interleaved",
    "layer_times",
    "measure",
    "predicted_ms",
    "roofline",
]
