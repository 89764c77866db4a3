"""What a script for TRL's trainer does with ours: callbacks, state, model, adapters, the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
)

from orpo_ray import ConfigError, DataError, ORPOConfig, ORPOTrainer
from orpo_ray.demo.model import make_demo_model
from orpo_ray.orchestration.trainer.adapters import adapter_config, base_weights, lora_settings
from orpo_ray.orchestration.trainer.memory import KeptInputs
from orpo_ray.runs.manifest import checkpoint, write_manifest
from orpo_ray.storage.folder import Folder

SEVEN = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins log_odds_chosen"
SEVEN += " log_odds_ratio nll_loss"
EVENTS = ("init_end", "train_begin", "log", "evaluate", "save", "epoch_end", "train_end")


def pairs(n: int, start: int = 0) -> dict[str, list[str]]:
    numbers = range(start, start + n)
    return {
        "prompt": [f"{i}: " for i in numbers],
        "chosen": [f"yes {i}" for i in numbers],
        "rejected": ["no"] * n,
    }


class Watch(TrainerCallback):
    """Notes every event that comes, with the step at which it does."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        for event in EVENTS:
            setattr(self, f"on_{event}", self._noting(event))

    def _noting(self, event: str) -> Any:
        def note(args: Any, state: Any, control: Any, **more: Any) -> None:
            assert args.beta == 0.2
            self.seen.append((event, state.global_step))

        return note

    def steps(self, event: str) -> list[int]:
        """The steps at which an event came."""
        return [step for name, step in self.seen if name == event]


@dataclass
class Case:
    """A trained trainer, and what was before."""

    trainer: ORPOTrainer
    watch: Watch
    before: dict[str, torch.Tensor]
    result: Any


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a small model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_demo_model(str(folder), ["yes no"], 1)
    return folder


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    few = {"output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    return few | {"logging_steps": 1, "beta": 0.2, "sample_prompts": 0} | more


@pytest.fixture(scope="module")
def trained(ray_cluster, base, tmp_path_factory) -> Case:
    """Two epochs of two steps each, with objects for everything."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch()
    trainer = ORPOTrainer(
        model,
        ORPOConfig(
            **settings(tmp_path_factory.mktemp("runs")),
            num_train_epochs=2,
            eval_strategy="epoch",
            save_strategy="epoch",
            lr_scheduler_type="constant",
            report_to="none",
        ),
        train_dataset=pairs(8),
        eval_dataset=pairs(4, 100),
        callbacks=[watch],  # and the tokenizer of the folder that the model is from
        compute_metrics=lambda scored: {"right": np.mean(np.diff(scored.predictions) < 0)},
    )
    assert trainer.model is model
    return Case(trainer, watch, before, trainer.train())


def test_the_result_has_what_users_of_trl_and_of_ray_look_for(trained):
    result = trained.result
    assert {*SEVEN.split(), "train_loss", "train_runtime", "eval_loss"} <= result.metrics.keys()
    losses = [line["loss"] for line in trained.trainer.state.log_history if "loss" in line]
    assert result.training_loss == pytest.approx(np.mean(losses)) == result.metrics["train_loss"]
    assert result.global_step == 4
    assert isinstance(result.checkpoint, ray.train.Checkpoint)
    assert (Path(result.checkpoint.path) / "model.safetensors").exists()
    assert Path(result.path, "metrics.jsonl").exists()
    assert result.metrics_dataframe["step"].tolist() == [0, 1, 2, 3, 4]


def test_the_state_is_that_of_transformers(trained):
    state = trained.trainer.state
    history = state.log_history
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 2, 4]
    wanted = {"loss", "learning_rate", "grad_norm", "epoch", "step", *SEVEN.split()}
    assert all(wanted <= line.keys() for line in history if "loss" in line)
    assert all("eval_right" in line for line in history if "eval_loss" in line)
    assert history[-1]["train_loss"] > 0
    assert (state.global_step, state.epoch, state.max_steps) == (4, 2.0, 4)
    values = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    assert state.best_metric == min(values[2], values[4])


def test_callbacks_are_called_on_the_driver(trained):
    watch = trained.watch
    assert watch.seen[0] == ("init_end", 0)
    assert watch.steps("train_begin") == [0]
    assert watch.steps("log") == [0, 1, 2, 2, 3, 4, 4]
    assert watch.steps("evaluate") == [0, 2, 4]
    assert watch.steps("epoch_end") == [2, 4]
    assert len(watch.steps("save")) == 2
    assert watch.seen[-1] == ("train_end", 4)


def test_the_model_that_was_given_is_trained(trained):
    trainer = trained.trainer
    after = trainer.model.state_dict()
    assert not [name for name, value in trained.before.items() if torch.equal(value, after[name])]
    saved = AutoModelForCausalLM.from_pretrained(trainer.save_model(), dtype=torch.float32)
    for name, value in saved.state_dict().items():
        assert torch.equal(value, after[name]), name


@pytest.mark.slow
def test_evaluation_has_the_prefix_and_computed_metrics(trained):
    trainer = trained.trainer
    ours = trainer.evaluate(metric_key_prefix="mine")
    assert {"mine_loss", "mine_right", "mine_rewards/margins"} <= ours.keys()
    assert all(name.startswith("mine_") for name in ours)
    test = trainer.predict(pairs(6, 200))
    assert test.predictions.shape == (6, 2)
    assert not test.label_ids.any()
    chosen, rejected = test.predictions.mean(0)
    assert test.metrics["test_logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert test.metrics["test_logps/rejected"] == pytest.approx(rejected, rel=1e-5)
    assert test.metrics["test_right"] == test.metrics["test_rewards/accuracies"]
    after = trainer.evaluate()
    assert after["eval_loss"] < trained.evaluated["start_loss"]
    assert trainer.state.log_history[-1]["eval_loss"] == after["eval_loss"]


def test_metrics_and_state_are_saved_where_trl_saves_them(trained, capsys):
    trainer = trained.trainer
    trainer.log_metrics("train", trained.result.metrics)
    assert "***** train metrics *****" in capsys.readouterr().out
    trainer.save_metrics("train", {"train_loss": 1.0})
    trainer.save_metrics("eval", {"eval_loss": 2.0})
    trainer.save_state()
    folder = Path(trainer.args.output_dir)
    assert json.loads((folder / "train_results.json").read_text()) == {"train_loss": 1.0}
    together = json.loads((folder / "all_results.json").read_text())
    assert together == {"train_loss": 1.0, "eval_loss": 2.0}
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4


@dataclass
class Hub:
    """What a stand-in for the hub was asked, and the files that were committed to it."""

    address: str
    calls: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"id": "me/tiny", "sha": "0" * 40, "siblings": [], "private": False})

        def do_POST(self) -> None:
            found.calls.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
            if "/preupload/" in self.path:
                asked = [file["path"] for file in json.loads(body)["files"]]
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [plain | {"path": path} for path in asked]})
            elif "/commit/" in self.path:
                items = [json.loads(line) for line in body.splitlines()]
                parts = [item["value"] for item in items if item["key"] == "file"]
                found.files |= {p["path"]: base64.b64decode(p["content"]) for p in parts}
                url = f"{found.address}/me/tiny/commit/{'1' * 40}"
                self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
            else:
                self.answer({"url": f"{found.address}/me/tiny", "name": "tiny"})

        def answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_model_is_pushed_with_its_card(trained, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    trainer = trained.trainer
    trainer.args = trainer.args.replace(hub_model_id="me/tiny", hub_revision="second")
    trainer.push_to_hub(dataset_name="me/pairs", tags="mine")
    assert "/api/models/me/tiny/commit/second" in hub.calls
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    assert "- me/pairs" in card
    assert "- mine" in card
    assert b"hf_of_a_test" not in b"".join(hub.files.values())


@pytest.mark.slow
def test_training_resumes_in_the_newest_run_with_a_checkpoint(trained, base):
    """The history is that of the whole run; what is called again is of new steps alone."""
    first = trained.trainer
    watch = Watch()
    again = ORPOTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        ORPOConfig(
            **settings(Path(first.args.output_dir)), max_steps=6, lr_scheduler_type="constant"
        ),
        train_dataset=pairs(8),
        tokenizer=AutoTokenizer.from_pretrained(base),
        callbacks=[watch],
    )
    made = Path(again.args.output_dir, again.args.run_name)
    result = again.train(resume_from_checkpoint=True)
    assert result.run_directory == trained.result.run_directory
    assert not made.exists()
    history = again.state.log_history
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert watch.steps("log") == [5, 6]


class StopSoon(TrainerCallback):
    """Asks for the end of training at step 2."""

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        control.should_training_stop = state.global_step >= 2


@pytest.mark.slow
def test_adapters_by_peft_and_an_end_by_a_callback(ray_cluster, base, tmp_path):
    """The run ends as if the next step had been its last: it is logged, saved and exported."""
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(**settings(tmp_path, run_name="adapters"), max_steps=10_000),
        train_dataset=pairs(8),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        callbacks=[StopSoon],
    )
    result = trainer.train()
    assert 2 < result.global_step < 10_000
    assert result.global_step == result.metrics["step"] == trainer.state.global_step
    assert isinstance(trainer.model, peft.PeftModel)
    adapter = json.loads((tmp_path / "adapters/final/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 8)
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    tuned = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert len(tuned) == 8
    assert all(value.any() for value in tuned)
    with pytest.raises(ConfigError, match="its adapters were trained before"):
        adapter_config(trainer.model)


class Ask(TrainerCallback):
    """Asks for a checkpoint and an evaluation at the first step, and for the end when both came."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.evaluated: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        control.should_save = control.should_evaluate = state.global_step == 1

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self.saved.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self.evaluated.append(state.global_step)
        control.should_training_stop = state.global_step > 0


@pytest.mark.slow
def test_what_callbacks_ask_for_is_done(ray_cluster, base, tmp_path, hub, monkeypatch):
    """With `logging_first_step`, and a push at the end."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    asks = Ask()
    few = settings(tmp_path) | {"logging_steps": 100_000, "save_steps": 100_000}
    trainer = ORPOTrainer(
        str(base),
        ORPOConfig(
            **few,
            max_steps=100_000,
            logging_first_step=True,
            push_to_hub=True,
            hub_model_id="me/tiny",
        ),
        train_dataset=pairs(8),
        eval_dataset=pairs(4, 100),
        callbacks=[asks],
    )
    last = trainer.train().global_step
    losses = [line["step"] for line in trainer.state.log_history if "loss" in line]
    assert losses == [1, last]
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    assert evaluated == asks.evaluated
    assert (evaluated[0], evaluated[-1], len(evaluated)) == (0, last, 3)
    assert 1 < evaluated[1] < last < 100_000
    assert len(asks.saved) == 2  # the one that was asked for, and the last
    assert {"config.json", "model.safetensors", "README.md"} <= hub.files.keys()


class Broken(TrainerCallback):
    """Fails at the first line."""

    def on_log(self, *_: Any, **__: Any) -> None:  # noqa: D102
        raise RuntimeError("of a callback")


@pytest.mark.slow
def test_an_error_of_a_callback_is_raised_once_the_run_has_ended(ray_cluster, base, tmp_path):
    trainer = ORPOTrainer(
        str(base),
        ORPOConfig(**settings(tmp_path), max_steps=10_000),
        train_dataset=pairs(8),
        callbacks=[Broken()],
    )
    with pytest.raises(RuntimeError, match="of a callback"):
        trainer.train()
    assert trainer.model.dtype == torch.float32


def test_new_adapters_in_memory_are_a_config_and_a_base(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    names = {name: value.clone() for name, value in plain.state_dict().items()}
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert adapter_config(model).r == 2
    kept, weights = base_weights(model)
    assert kept is plain
    assert weights is not None
    assert weights.keys() == names.keys()
    assert all(torch.equal(weights[name], value) for name, value in names.items())
    assert base_weights(AutoModelForCausalLM.from_pretrained(base))[1] is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"target_modules": "all-linear"}, {"lora_r": 8, "lora_target_modules": None}),
        ({"r": 4, "lora_dropout": 0.1}, {"lora_r": 4, "lora_dropout": 0.1}),
        ({}, {"lora_target_modules": ["q_proj", "v_proj"]}),  # peft's own of a Llama
        ({"target_modules": {"b", "a"}}, {"lora_target_modules": ["a", "b"]}),
    ],
)
def test_a_lora_config_becomes_settings(given, wanted):
    found = lora_settings(peft.LoraConfig(task_type="CAUSAL_LM", **given), "llama")
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(use_dora=True, bias="all"), "bias='all' has no setting here"),
        (peft.LoraConfig(target_modules=".*q_proj"), "is a pattern; list the names"),
        (peft.LoraConfig(task_type="SEQ_CLS"), "task_type='SEQ_CLS' is not CAUSAL_LM"),
        (peft.PrefixTuningConfig(), "a PrefixTuningConfig has no settings here"),
    ],
)
def test_what_has_no_setting_is_refused_by_name(config, said):
    with pytest.raises(ConfigError) as caught:
        lora_settings(config, "llama")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data_collator": print}, "data_collator: not taken; rows are packed"),
        ({"optimizers": (print, None)}, "optimizers: not taken; learning_rate"),
        ({"tokenizer": "a", "processing_class": "b"}, "another name of processing_class"),
        ({"args": {"beta": 1}}, "args: a dict; give an orpo_ray.ORPOConfig"),
        ({"train_dataset": None}, "train_dataset: a model, but no pairs to train it on"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(tmp_path, base, arguments, said):
    given = {"args": ORPOConfig(tmp_path), "train_dataset": pairs(2)} | arguments
    with pytest.raises((ConfigError, DataError)) as caught:
        ORPOTrainer(str(base), **given)
    assert said in str(caught.value)
    assert not list(tmp_path.glob("demo-*"))


def test_frozen_weights_stay_frozen(base, tmp_path):
    """By the names of whole modules where all of one is frozen; adapters leave them anyway."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].self_attn.q_proj.requires_grad_(False)
    trainer = ORPOTrainer(model, ORPOConfig(tmp_path), train_dataset=pairs(2))
    # The head is the embedding: it is frozen with it, and so is its name.
    assert trainer.args.frozen_weights == (
        *("model.embed_tokens", "model.layers.1", "model.layers.2.self_attn.q_proj", "lm_head"),
    )
    trainer = ORPOTrainer(model, ORPOConfig(tmp_path, lora_r=2), train_dataset=pairs(2))
    assert trainer.args.frozen_weights == ()


def test_datasets_that_make_their_rows_are_read_through(tmp_path):
    """A stream, and what a transform makes; each is one file, named by what it holds."""
    kept = KeptInputs(Folder.at(tmp_path / "inputs"))
    whole = datasets.Dataset.from_dict(pairs(5))
    (stream,) = kept.files(whole.to_iterable_dataset(num_shards=2))
    assert pq.read_table(stream).to_pydict() == pairs(5)
    shouted = whole.with_transform(
        lambda rows: {name: [text.upper() for text in texts] for name, texts in rows.items()}
    )
    (transformed,) = kept.files(shouted)
    assert pq.read_table(transformed)["chosen"].to_pylist() == [f"YES {i}" for i in range(5)]
    assert kept.files(whole.to_iterable_dataset()) == (stream,)
    more = whole.add_column("score", [1.0] * 5)
    more.set_format("torch", columns=["prompt", "chosen", "rejected"])
    (plain,) = kept.files(more)
    assert pq.read_table(plain).to_pydict() == pairs(5)
    assert len(list((tmp_path / "inputs").iterdir())) == 3


def test_a_tokenizer_is_found_where_a_model_is_from(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = ORPOTrainer(model, ORPOConfig(tmp_path), train_dataset=pairs(2))
    assert trainer.processing_class.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    named = ORPOTrainer(str(base), ORPOConfig(tmp_path), train_dataset=pairs(2))
    assert named.tokenizer.get_vocab() == trainer.tokenizer.get_vocab()
    model.config._name_or_path = ""
    with pytest.raises(ConfigError, match="a model in memory comes without its tokenizer"):
        ORPOTrainer(model, ORPOConfig(tmp_path), train_dataset=pairs(2))


def test_a_subclass_with_methods_that_are_never_called_is_refused(tmp_path):
    class Mine(ORPOTrainer):
        def compute_loss(self) -> None:
            pass

    with pytest.raises(TypeError, match="Mine overrides what is never called here: compute_loss"):
        Mine(args=ORPOConfig(tmp_path))


def test_attributes_and_callbacks_that_stay_out_say_the_way(base, tmp_path, caplog):
    args = ORPOConfig(tmp_path, eval_strategy="epoch", run_name="early")
    stopping = EarlyStoppingCallback(early_stopping_patience=3)
    trainer = ORPOTrainer(str(base), args, eval_dataset=pairs(2), callbacks=[stopping, Steps])
    assert trainer.args.early_stopping_patience == 3
    assert "callback Steps: on_step_end are not called" in caplog.text
    assert isinstance(trainer.pop_callback(Steps), Steps)
    with pytest.raises(AttributeError, match=r"no 'optimizer': it lives in the workers"):
        _ = trainer.optimizer
    assert trainer.accelerator.is_main_process
    with pytest.raises(AttributeError, match="accelerator has no 'prepare': training runs in Ray"):
        trainer.accelerator.prepare(trainer)
    with pytest.raises(AttributeError, match=r"no 'whatever'; docs/trl\.md lists"):
        _ = trainer.whatever
    with pytest.raises(DataError, match="no pairs to train on"):
        trainer.train()


class Steps(TrainerCallback):
    """Wants an event that does not come."""

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: D102
        pass


def test_a_run_to_resume_has_to_exist(base, tmp_path):
    trainer = ORPOTrainer(str(base), ORPOConfig(tmp_path / "runs"), train_dataset=pairs(2))

    def refused(given: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            trainer.train(resume_from_checkpoint=given)
        return str(caught.value)

    assert refused(True).endswith("runs has a checkpoint")
    assert "no checkpoint of a run" in refused(str(tmp_path))
    run = Folder.at(tmp_path / "other")
    for step in (2, 4):
        made = checkpoint(run, step)
        made.path.mkdir(parents=True)
        write_manifest(made, {"step": step}, {})
    old = tmp_path / "other" / "checkpoints" / "step-00000002"
    assert "runs resume from their newest, which is step-00000004" in refused(old)


def test_special_tokens_of_a_template_that_was_applied_are_encoded(base, tmp_path, caplog):
    """As in TRL, where every answer has some; else a row with one is refused."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = pairs(4)
    talks = [[{"role": "user", "content": text}] for text in rows["prompt"]]
    written = [
        tokenizer.apply_chat_template(
            [*talk, {"role": "assistant", "content": text}], tokenize=False
        )
        for talk, text in zip(talks, rows["chosen"], strict=True)
    ]
    args = ORPOConfig(tmp_path)
    trainer = ORPOTrainer(str(base), args, train_dataset=rows | {"chosen": written})
    assert trainer.args.special_tokens_in_text == "allow"
    assert "special_tokens_in_text=allow" in caplog.text
    ended = [text + tokenizer.eos_token for text in rows["chosen"]]
    for answers in (ended, [*written[:3], "plain"]):
        trainer = ORPOTrainer(str(base), args, train_dataset=rows | {"chosen": answers})
        assert trainer.args.special_tokens_in_text == "refuse"


def test_a_tokenizer_without_an_end_token_is_refused(base, tmp_path):
    """One without a padding token is not: nothing is padded."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    args = ORPOConfig(tmp_path)
    ORPOTrainer(str(base), args, train_dataset=pairs(2), processing_class=tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="processing_class: it has no eos_token"):
        ORPOTrainer(str(base), args, train_dataset=pairs(2), processing_class=tokenizer)


def test_fifty_thousand_rows_in_memory_are_one_file(base, tmp_path):
    rows = datasets.Dataset.from_dict(pairs(50_000))
    trainer = ORPOTrainer(str(base), ORPOConfig(tmp_path), train_dataset=rows)
    (file,) = trainer.args.train_files
    assert pq.read_metadata(file).num_rows == 50_000


def test_a_data_set_of_splits_is_refused(base, tmp_path):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(pairs(2))})
    with pytest.raises(DataError, match="of several splits: give one, such as 'train'"):
        ORPOTrainer(str(base), ORPOConfig(tmp_path), train_dataset=splits)


@pytest.mark.parametrize("kind", [dict, datasets.Dataset.from_dict])
def test_prompts_are_what_both_answers_begin_with(tmp_path, kind):
    """As in TRL, with the space before the answers in them; a dialogue in one text is not split."""
    kept = KeptInputs(Folder.at(tmp_path / "inputs"))
    rows = {"chosen": ["Sky? Is blue.", "2+2: 4"], "rejected": ["Sky? Is green.", "2+2: 5"]}
    (file,) = kept.files(kind(rows))
    assert pq.read_table(file).to_pydict() == {
        "chosen": [" blue.", " 4"],
        "rejected": [" green.", " 5"],
        "prompt": ["Sky? Is", "2+2:"],
    }
    talk = {name: ["\n\nHuman: a\n\nAssistant: " + name] for name in ("chosen", "rejected")}
    (file,) = kept.files(kind(talk))
    assert pq.read_table(file).to_pydict() == talk
    asked = rows | {"question": ["a", "b"]}
    (file,) = kept.files(kind(asked))
    assert pq.read_table(file).to_pydict() == asked
