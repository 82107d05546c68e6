"""Work on other processes: run functions on workers beside loaded data, and measure devices. Knows no method's name."""

from cluster.base import Cluster, ClusterError, Done, Event, Failed, Item, Step, Stopped, always
from cluster.inline import InlineCluster
from cluster.jobs import Job, Jobs
from cluster.layers import LayerShape, layer_times
from cluster.meter import Latency, Reading, identity, interleaved, measure
from cluster.ray_cluster import RayCluster
from cluster.roofline import Roofline, predicted_ms, roofline
from cluster.runtimes import Program, Runtime

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
