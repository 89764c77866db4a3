"""Shares of CPUs, and what is said of resources that are not there."""

import time
from pathlib import Path

import pytest
from ray.util import placement_group, remove_placement_group

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.orchestration.cluster.connection import (
    cpu_share,
    output_warning,
    waiting_text,
    with_cluster,
)
from orpo_ray.storage.folder import Folder


@pytest.mark.parametrize(
    ("num_workers", "cpus", "share"),
    [
        (1, [2.0], 2.0),
        (3, [2.0], 2 / 3),
        (40, [2.0], 2 / 40),
        (2, [0.0, 4.0], 2.0),  # a head without CPUs
        (2, [0.0, 4.0, 4.0], 4.0),
        (3, [8.0, 2.0], 2.0),
        (4, [8.0, 2.0], 2.0),
    ],
)
def test_workers_get_the_largest_share_of_which_the_nodes_hold_all(num_workers, cpus, share):
    assert cpu_share(num_workers, cpus) == pytest.approx(share)


def test_workers_that_ask_for_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"^resources_per_worker: .*\{CPU: 0\}"):
        with_cluster(ORPOConfig(resources_per_worker={"CPU": 0}))


def test_what_workers_wait_for_is_said(ray_cluster):
    """One placement group holds both CPUs, so that a second one waits."""
    config = ORPOConfig(resources_per_worker={"CPU": 2.0})
    assert waiting_text(config) is None
    held = placement_group([{"CPU": 2.0}])
    assert held.wait(60)
    waits = placement_group([{"CPU": 2.0}])
    try:
        deadline = time.monotonic() + 60
        while "0 of 2 CPU are free" not in (waiting_text(config) or ""):
            assert time.monotonic() < deadline, waiting_text(config)
            time.sleep(0.1)
        told = waiting_text(config)
        assert told.startswith("waiting for resources: 1 workers need 2 CPU each")
        assert waiting_text(ORPOConfig(resources_per_worker={"CPU": 1.0})) is None
    finally:
        remove_placement_group(waits)
        remove_placement_group(held)


def test_a_run_in_a_jobs_copy_of_its_folder_is_warned_of(tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0a1b"
    told = output_warning(Folder.at(copy / "runs" / "r"))
    assert told.startswith(f"output_dir: {copy}/runs is in the copy")
    assert output_warning(Folder.at(tmp_path / "runs" / "r")) is None
    assert output_warning(Folder.at(Path("s3://bucket/runs/r").as_posix())) is None
