"""Work on other processes: run functions on workers beside loaded data, and measure devices. Knows no method's name."""

from cluster.base import Cluster, Done, Event, Failed, Step
from cluster.inline import InlineCluster
from cluster.meter import Latency, interleaved
from cluster.ray_cluster import ClusterError, RayCluster

__all__ = [
    "Cluster",
    "ClusterError",
    "Done",
    "Event",
    "Failed",
    "InlineCluster",
    "Latency",
    "RayCluster",
    "Step",
    "interleaved",
]
