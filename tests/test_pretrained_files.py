"""Which files the weights of a model are read from: its own safetensors and no others."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orpo_ray.config.file import load_config
from orpo_ray.demo.model import make_demo_model
from orpo_ray.orchestration.inputs import find_inputs
from orpo_ray.preference.errors import DataError
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model, refuse_unsafe

INDEX = "model.safetensors.index.json"


class Trace:
    """What leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_demo_model(str(folder), ["hello"] * 9, 1)
    return folder


@pytest.fixture
def model(demo_model, tmp_path) -> Path:
    return shutil.copytree(demo_model, tmp_path / "model")


def write_index(model: Path, file: object, index: str = INDEX) -> None:
    names = load_file(model / "model.safetensors")
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file)}
    (model / index).write_text(json.dumps(content))


def refused(model: Path) -> str:
    """What a run and each loading say of the model, which is the same."""
    source = ModelSource(str(model), str(model))
    with pytest.raises(UnsupportedModelError) as at_start:
        refuse_unsafe(source)
    with pytest.raises(UnsupportedModelError) as at_load:
        load_model(source, torch.float32)
    assert str(at_start.value) == str(at_load.value)
    return str(at_load.value)


@pytest.mark.parametrize("place", ["weights.pt", "weights.bin", "model.safetensors.bin", "w"])
def test_no_index_makes_a_pickle_of_weights(model, tmp_path, place):
    write_index(model, place)
    (model / "model.safetensors").unlink()
    (model / place).write_bytes(pickle.dumps(Trace(tmp_path / "trace")))
    assert f"{INDEX} names '{place}'" in refused(model)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("place", ["../private.safetensors", "{}/private.safetensors", "a/b", 7])
def test_no_index_names_files_of_other_folders(model, tmp_path, place):
    shutil.copy(model / "model.safetensors", tmp_path / "private.safetensors")
    file = place.format(tmp_path) if isinstance(place, str) else place
    write_index(model, file)
    (model / "model.safetensors").unlink()
    assert "only safetensors files in the same folder are read" in refused(model)


def test_neither_does_an_index_of_a_variant_or_the_config(model):
    write_index(model, "../w.bin", "model.fp16.safetensors.index.json")
    assert "model.fp16.safetensors.index.json names" in refused(model)
    (model / "model.fp16.safetensors.index.json").unlink()
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (model / "config.json").write_text(json.dumps(config))
    assert "config.json names 'other.safetensors' as transformers_weights" in refused(model)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_named(model, content):
    (model / INDEX).write_text(content)
    assert f"{INDEX} is no index of weights" in refused(model)


def test_the_base_model_of_adapters_is_looked_at_too(model, tmp_path):
    write_index(model, "weights.bin")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    settings = {"base_model_name_or_path": str(model), "peft_type": "LORA"}
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    assert "names 'weights.bin'" in refused(adapters)


def test_an_index_of_its_own_safetensors_is_read(model):
    write_index(model, "model-00001-of-00001.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    source = ModelSource(str(model), str(model))
    refuse_unsafe(source)
    assert load_model(source, torch.float32).num_parameters() > 0


def test_a_run_names_the_setting(model, tmp_path):
    write_index(model, "../w.safetensors")
    config = load_config(None, [f"model_name_or_path={model}", "output_dir=x"])
    with pytest.raises(DataError, match=r"model_name_or_path: .*names '../w.safetensors'"):
        find_inputs(config, tmp_path)
