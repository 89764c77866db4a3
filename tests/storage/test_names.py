"""Names that others chose: of objects in a bucket, and URLs, which become paths on this disk."""

import pytest

from orpo_ray.config.file import load_config
from orpo_ray.config.schema import ConfigError
from orpo_ray.orchestration.inputs import find_inputs
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.finding import find_files
from orpo_ray.preference.reading.sources import remote_file_system
from orpo_ray.storage.folder import DRIVER, VIEWS, WORKERS, Folder
from orpo_ray.storage.names import UnsafeNameError, is_plain
from orpo_ray.storage.scratch import copies_root

UNSAFE_URLS = (
    "s3://bucket/../../home",
    "s3://bucket/runs/../../../x",
    "s3://bucket/./runs",
    "s3://bucket//runs",
    "s3://bucket/runs/..",
    "s3://../runs",
    "s3:///runs",
    "s3://",
    "gs://bucket/a/../b",
    "s3://bucket?endpoint_override=elsewhere/runs",
)


@pytest.mark.parametrize("name", ["a", "a/b.json", "a..b", ".hidden", "..a/b...", "ü/日本"])
def test_ordinary_names_are_plain(name):
    assert is_plain(name)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0b", "a\x1b"])
def test_names_that_lead_elsewhere_are_not_plain(name):
    assert not is_plain(name)


@pytest.mark.parametrize("url", UNSAFE_URLS)
def test_a_url_that_leads_elsewhere_is_refused(url, tmp_path):
    for side in (DRIVER, WORKERS, VIEWS):
        with pytest.raises(UnsafeNameError):
            Folder.at(url, side)
    for setting in ("output_dir", "token_cache_dir"):
        with pytest.raises(ConfigError, match=setting):
            load_config(None, [f"{setting}={url!r}"])
    with pytest.raises(ConfigError, match=r"names no bucket|has an empty part"):
        load_config(f"{url}/run.yaml", [])
    config = load_config(None, [])
    with pytest.raises(DataError, match="model_name_or_path"):
        find_inputs(config.replace(model_name_or_path=url), tmp_path)


@pytest.mark.parametrize(
    "url", ["s3://bucket/runs\n", "s3://key:secret@bucket/runs", "../../victim://bucket/x"]
)
def test_a_url_with_a_control_character_credentials_or_a_path_before_it_is_no_place(url):
    with pytest.raises(UnsafeNameError):
        Folder.at(url)


@pytest.mark.parametrize("url", [url for url in UNSAFE_URLS if url.startswith("s3")])
def test_data_is_not_read_from_a_url_that_leads_elsewhere(url):
    with pytest.raises(DataError, match="UnsafeNameError"):
        find_files([f"{url}/pairs.jsonl"])


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/a/../pairs.jsonl",
        "https://127.0.0.1:9/a/%2e%2e/pairs.jsonl",
        "https://127.0.0.1:9//pairs.jsonl",
        "https://127.0.0.1:9/./pairs.jsonl#part",
        "file:///tmp/../etc/pairs.jsonl",
        "memory://a/../pairs.jsonl",
        "gcs://bucket/a/../pairs.jsonl",
        "hf://datasets/a/b/../../c/pairs.jsonl",
        "zip://pairs.jsonl::https://127.0.0.1:9/a/../pairs.zip",
    ],
)
def test_so_is_no_url_of_data_on_any_file_system(url):
    """Before anything is asked of it: nothing listens on port 9."""
    with pytest.raises(UnsafeNameError):
        remote_file_system(url)
    with pytest.raises(DataError, match="UnsafeNameError"):
        find_files([url])


@pytest.mark.parametrize("url", ["file:///tmp/a/", "memory://a/*.jsonl", "memory:///a/b..c.jsonl"])
def test_other_urls_of_data_are_read(url):
    remote_file_system(url)


@pytest.mark.parametrize("name", ["../other", "..", "a/../../b", "/etc/passwd", "a//b", ""])
def test_a_name_below_a_folder_stays_there(name, bucket, tmp_path):
    for folder in (Folder.at(tmp_path), Folder.at("s3://bucket/names")):
        with pytest.raises(UnsafeNameError):
            folder / name
        with pytest.raises(UnsafeNameError):
            folder.fetch_file(name)
        with pytest.raises(UnsafeNameError):
            folder.rename("a", name)
        if name:
            with pytest.raises(UnsafeNameError):
                folder.remove(name)


@pytest.mark.parametrize("key", ["../../../../up.txt", "inner/../../x", "a/./b", "tab\there"])
def test_an_object_whose_name_leads_elsewhere_is_refused_with_its_folder(bucket, key):
    folder = Folder.at("s3://bucket/theirs")
    bucket.put_object(Bucket="bucket", Key="theirs/config.json", Body=b"{}")
    bucket.put_object(Bucket="bucket", Key=f"theirs/{key}", Body=b"planted")
    with pytest.raises(OSError, match="theirs"):
        folder.fetch()
    bucket.delete_object(Bucket="bucket", Key=f"theirs/{key}")
    written = [path for path in copies_root().parent.rglob("*") if path.is_file()]
    assert not [path for path in written if b"planted" in path.read_bytes()]


def test_status_refuses_a_url_that_leads_elsewhere_in_one_line(run_here, tmp_path):
    done = run_here(tmp_path, "jobs/status.py", "s3://bucket/../../x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "s3://bucket/../../x" in done.stderr
