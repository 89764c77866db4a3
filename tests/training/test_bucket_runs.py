"""Runs that are kept in a bucket, on ranks that share nothing else, without Ray."""

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from orpo_ray.runs.files import count_events
from orpo_ray.runs.manifest import checkpoint, find_damage, newest_checkpoint
from orpo_ray.storage.folder import WORKERS, Folder
from tests.reference.small_run import metrics_without_times, train_small
from tests.training.test_loop import weights_digest


def train_on_own_node(inputs: Path, scratch: Path, url: str) -> None:
    """This rank's share, on a node whose disk no other rank sees."""
    os.environ["ORPO_RAY_SCRATCH"] = str(scratch / f"node-{dist.get_rank()}")
    os.environ["LOCAL_RANK"] = "0"
    train_small(inputs, Folder.at(url, WORKERS), {})


def found_in_bucket(url: str) -> Path:
    """A run as someone finds it who has nothing of it yet."""
    return Folder.at(url).fetch_again().path


def objects(bucket, run: str) -> list[str]:
    found = bucket.list_objects_v2(Bucket="bucket", Prefix=f"{run}/")["Contents"]
    return [e["Key"].removeprefix(f"{run}/") for e in found if not e["Key"].endswith("/")]


@pytest.fixture(scope="module")
def kept(run_ranks, bucket, inputs, tmp_path_factory) -> str:
    """24 steps on two nodes, whose disks are gone."""
    scratch = tmp_path_factory.mktemp("nodes")
    run_ranks(2, train_on_own_node, inputs, scratch, "s3://bucket/kept", new_processes=True)
    shutil.rmtree(scratch)
    return "kept"


def interrupted_copy(bucket, kept: str, to: str, last_step: int) -> str:
    """The run as it lay in the bucket when all was lost some time after the save at `last_step`."""
    for name in objects(bucket, kept):
        parts = name.split("/")
        step = int(parts[1].removeprefix("step-")) if parts[0] == "checkpoints" else 0
        if parts[0] != "final" and step <= last_step:
            source = {"Bucket": "bucket", "Key": f"{kept}/{name}"}
            bucket.copy_object(Bucket="bucket", Key=f"{to}/{name}", CopySource=source)
    return f"s3://bucket/{to}"


def assert_same(run: Path, expected: Path) -> None:
    assert weights_digest(run) == weights_digest(expected)
    assert metrics_without_times(run) == metrics_without_times(expected)
    for name in ("ledger", "margins", "evaluations", "samples"):
        assert (run / f"{name}.jsonl").read_bytes() == (expected / f"{name}.jsonl").read_bytes()


def test_a_run_in_a_bucket_is_the_run_on_a_disk(kept, whole_run):
    """To the byte; and it met nothing on its way."""
    run = found_in_bucket(f"s3://bucket/{kept}")
    assert_same(run, whole_run)
    assert count_events(run) == {}
    names = {path.relative_to(whole_run).as_posix() for path in whole_run.rglob("*.*")}
    assert {path.relative_to(run).as_posix() for path in run.rglob("*.*")} == names


def test_it_goes_on_where_every_disk_was_lost(run_ranks, bucket, kept, inputs, whole_run, tmp_path):
    """One bit flipped in a shard of the newest checkpoint: the one before is used, and says so.

    In the end no node keeps any tensors; between saves it keeps those of one checkpoint.
    """
    url = interrupted_copy(bucket, kept, "lost", last_step=21)
    shard = {"Bucket": "bucket", "Key": "lost/checkpoints/step-00000021/__1_0.distcp"}
    content = bytearray(bucket.get_object(**shard)["Body"].read())
    content[len(content) // 2] ^= 1
    bucket.put_object(**shard, Body=bytes(content))
    run_ranks(2, train_on_own_node, inputs, tmp_path, url, new_processes=True)
    run = found_in_bucket(url)
    assert_same(run, whole_run)
    assert count_events(run) == {"checkpoints_set_aside": 1, "resumed": 1, "steps_redone": 10}
    names = objects(bucket, "lost")
    aside = "checkpoints/set-aside/"
    assert {f"{aside}REASON", f"{aside}step-00000021/__1_0.distcp"} <= set(names)
    steps = {name.split("/")[1] for name in names if name.startswith("checkpoints/step-")}
    assert steps == {"step-00000014", "step-00000021", "step-00000024"}
    for node in ("node-0", "node-1"):
        assert list((tmp_path / node).rglob("*.jsonl")) or node == "node-1"
        assert list((tmp_path / node).rglob("*.distcp")) == []
        assert list((tmp_path / node).rglob("*.safetensors")) == []


def test_a_damaged_copy_costs_no_checkpoint(bucket, kept):
    """One bit flipped on a node's disk, with the time of the file as it was: fetched again."""
    run = Folder.at(interrupted_copy(bucket, kept, "flipped", last_step=21)).fetch_again()
    damaged = checkpoint(run, 21)
    shard = damaged.path / "__1_0.distcp"
    content, times = bytearray(shard.read_bytes()), shard.stat()
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert find_damage(damaged) == "__1_0.distcp does not match its checksum"
    aside = []
    assert newest_checkpoint(run, lambda *about: aside.append(about)) == 21
    assert aside == []


@pytest.mark.slow
def test_another_number_of_nodes_goes_on(run_ranks, bucket, kept, inputs, whole_run, tmp_path):
    """One node fetches what two have written; the same batches follow."""
    url = interrupted_copy(bucket, kept, "fewer", last_step=21)
    run_ranks(1, train_on_own_node, inputs, tmp_path, url, new_processes=True)
    run = found_in_bucket(url)
    assert (run / "ledger.jsonl").read_bytes() == (whole_run / "ledger.jsonl").read_bytes()
    assert "resumed at step 21 of 24" in (run / "run.log").read_text()
    assert list((run / "final").glob("*.safetensors"))
