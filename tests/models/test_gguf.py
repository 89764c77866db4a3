"""A base model in a GGUF file: converted whole, trained from Python, refused where it cannot be."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.outline import outline, unused_weights
from orpo_ray.orchestration.inputs import find_inputs
from orpo_ray.preference.errors import DataError
from orpo_ray.pretrained import load_model
from orpo_ray.storage.folder import Folder
from orpo_ray.training.estimate import plan_lines

pytest.importorskip("gguf", reason="needs the package gguf")
from orpo_ray.models.gguf import convert_gguf
from tests.reference.gguf_file import TEXTS, write_gguf


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return tmp_path


def config(files: Path, name: object, **changes):
    return ORPOConfig(
        model_name_or_path=str(name),
        train_files=str(files / "pairs.jsonl"),
        output_dir=str(files / "runs"),
        **changes,
    )


def problem(files: Path, name: object, only_evals: bool = False) -> str:
    given = config(files, name)
    with pytest.raises(DataError) as found:
        find_inputs(given, given.output.output_dir, only_evals)
    (line,) = found.value.lines
    assert line.startswith("model_name_or_path: ")
    return line


def test_a_gguf_becomes_an_ordinary_folder(files, caplog):
    """From the weights and tokens that it was written of, bit by bit."""
    caplog.set_level("INFO", "orpo_ray")
    model, tokenizer = write_gguf(files / "tiny.gguf")
    given = config(files, files / "tiny.gguf")
    source = find_inputs(given, given.output.output_dir).model
    assert f"{files}/tiny.gguf (F32) is dequantized to float32, in {source.model}" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(source.model)
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    read = AutoTokenizer.from_pretrained(source.tokenizer)
    messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "ok"}]
    rendered = read.apply_chat_template(messages, tokenize=False)
    assert rendered == tokenizer.apply_chat_template(messages, tokenize=False)
    assert read(TEXTS[1])["input_ids"] == tokenizer(TEXTS[1])["input_ids"]
    assert (read.eos_token, read.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert unused_weights(source, outline(source)) == []


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", torch.bfloat16), ("F16", torch.float16)])
def test_the_type_of_the_folder_follows_the_file(files, kind, dtype):
    model, _ = write_gguf(files / "tiny.gguf", kind)
    folder, said = convert_gguf(str(files / "tiny.gguf"), Folder.at(files / "made"))
    assert f"({kind})" in said
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    for name, weight in loaded.named_parameters():
        # 8 bits of a block's largest value, which is under 0.1 here, and the type's own rounding.
        bound = 0.1 / 127 if weight.ndim == 2 else 1e-7
        assert (weight.float() - model.state_dict()[name]).abs().max() < bound, name


def test_a_file_is_converted_once_and_another_one_again(files):
    write_gguf(files / "tiny.gguf")
    place = Folder.at(files / "made")
    first, _ = convert_gguf(str(files / "tiny.gguf"), place)
    (first.path / "README.md").write_text("kept\n")
    second, _ = convert_gguf(str(files / "tiny.gguf"), place)
    assert (second.path / "README.md").exists()
    write_gguf(files / "tiny.gguf", "F16")
    third, _ = convert_gguf(str(files / "tiny.gguf"), place)
    assert third.path != first.path


def test_what_was_left_by_a_conversion_that_broke_off_is_replaced(files):
    write_gguf(files / "tiny.gguf")
    place = Folder.at(files / "made")
    folder, _ = convert_gguf(str(files / "tiny.gguf"), place)
    (folder.path / "config.json").unlink()
    (folder.path / "model.safetensors").write_text("half")
    again, _ = convert_gguf(str(files / "tiny.gguf"), place)
    assert again.path == folder.path
    assert AutoModelForCausalLM.from_pretrained(again).num_parameters() > 0


def test_files_that_are_refused(files):
    write_gguf(files / "a.gguf")
    assert problem(files, files / "gone.gguf").endswith("gone.gguf: no such file")
    assert "copy it to one" in problem(files, "s3://models/a.gguf")
    (files / "bad.gguf").write_bytes(b"GGUF no")
    assert "bad.gguf: no readable GGUF file" in problem(files, files / "bad.gguf")
    whole = (files / "a.gguf").read_bytes()
    (files / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    assert "cut.gguf: no readable GGUF file" in problem(files, files / "cut.gguf")
    part = files / "big-00001-of-00002.gguf"
    part.write_bytes(whole)
    assert "llama-gguf-split --merge" in problem(files, part)
    write_gguf(files / "other.gguf", architecture="rwkv7")
    assert "other.gguf: transformers cannot load it: " in problem(files, files / "other.gguf")
    write_gguf(files / "less.gguf", drop="mlp.up_proj")
    assert "less.gguf: 2 of the model's weights are missing" in problem(files, files / "less.gguf")


def test_a_folder_of_gguf_files_names_them(files):
    folder = files / "folder"
    folder.mkdir()
    for name in ("q8.gguf", "q4.gguf"):
        write_gguf(folder / name)
    (folder / "config.json").write_text("{}")
    for only_evals in (False, True):
        assert problem(files, folder, only_evals).endswith(
            f"holds GGUF files only; name one of them: {folder}/q4.gguf, {folder}/q8.gguf"
        )


def test_without_the_package_a_file_is_refused(files, monkeypatch):
    write_gguf(files / "a.gguf")
    from transformers.utils import import_utils

    import_utils.is_gguf_available.cache_clear()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "gguf").is_dir()])
    monkeypatch.delitem(sys.modules, "gguf")
    try:
        line = problem(files, files / "a.gguf")
    finally:
        monkeypatch.undo()
        import_utils.is_gguf_available.cache_clear()
    assert line.endswith("a GGUF file needs the package gguf: pip install 'orpo_ray[gguf]'")


def test_the_estimate_reads_the_header(files):
    write_gguf(files / "tiny.gguf")
    lines = plan_lines(config(files, files / "tiny.gguf"))
    assert any(line.startswith("memory a worker: about ") for line in lines)
    assert not (files / "runs").exists()


def test_a_converted_model_is_loaded_as_any_other(files):
    model, _ = write_gguf(files / "tiny.gguf")
    given = config(files, files / "tiny.gguf")
    source = find_inputs(given, given.output.output_dir).model
    loaded = load_model(source, torch.float32)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
