"""Clusters for the tests of this folder: in this process, on a local Ray, and a second one on the same Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray

from cluster import Cluster, InlineCluster, RayCluster
from tests.cluster import cluster_items
from tests.cluster.cluster_items import CONTEXT, CPUS, WORKERS


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    ray.init(
        "local",
        num_cpus=CPUS,
        resources={"paredown_meter": 1, "phone": 1, "board": 1, "cable": 1},
        object_store_memory=2**28,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    made = RayCluster(CONTEXT, max_parallel=WORKERS, by_value=[cluster_items])
    yield made
    made.close()
    ray.shutdown()


@pytest.fixture
def single(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """A second cluster of one worker on the same Ray."""
    made = RayCluster(CONTEXT, max_parallel=CPUS - WORKERS)
    yield made
    made.close()


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return InlineCluster(CONTEXT) if request.param == "inline" else request.getfixturevalue("ray_cluster")
