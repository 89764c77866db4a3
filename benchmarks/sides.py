"""The two sides of a benchmark: each a process that takes its rounds when it is told to."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from orpo_ray.objective.objectives import objective_of
from orpo_ray.storage.folder import Folder
from workload import MAX_LENGTH, Work

LEARNING_RATE = 1e-5
ROOT = Path(__file__).resolve().parent.parent


def orpo_ray_side(work: Work, line: Connection) -> None:
    """This project's step, as its training loop takes it, without Ray."""
    import torch.distributed as dist

    from orpo_ray.config.schema import ORPOConfig
    from orpo_ray.dataset.order import Order
    from orpo_ray.dataset.shards import TokenSet
    from orpo_ray.dataset.stream import BatchPlan, TokenStream
    from orpo_ray.models.build import build_model
    from orpo_ray.objective.metrics import N_SUMS, LossWeights, metrics_from_sums
    from orpo_ray.runs.files import RunFiles
    from orpo_ray.training.checkpoint.saver import CheckpointSaver, Progress
    from orpo_ray.training.optimizer import build_optimizer, build_scheduler
    from orpo_ray.training.step import TrainState, train_step

    cuda = work.device == "cuda"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    store = dist.HashStore()
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
    device = torch.device(work.device)
    n_steps = work.steps * (work.rounds + 1)
    config = ORPOConfig(learning_rate=LEARNING_RATE, max_steps=n_steps, bf16=cuda or work.bf16)
    model = build_model(config, f"{work.folder}/model", device)
    optimizer = build_optimizer(model, config.train)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.train, n_steps),
        objective=objective_of(config.orpo),
        max_grad_norm=config.train.max_grad_norm,
        seed=config.train.seed,
        device=device,
    )
    tokens = TokenSet.load(work.tokens)
    assert tokens is not None
    order = Order(tuple(s.n_groups for s in tokens.shards), 1, seed=0, shuffle=False)
    chunk_tokens = config.train.head_chunk(model.causal_lm.config.vocab_size, cuda)
    plan = BatchPlan(work.batch // work.pairs_per_group, work.budget_tokens, chunk_tokens, True)
    batches = TokenStream(tokens, order, plan, 0, 1).batches(0, n_steps)
    weights = LossWeights(objective_of(config.orpo), 0.0)
    files = RunFiles(Folder.at(work.folder), is_writer=True)
    saver = CheckpointSaver(Folder.at(work.folder), keep=2)

    def steps() -> Iterator[float]:
        for batch in batches:
            sums = torch.zeros(N_SUMS, dtype=torch.float64, device=device)
            train_step(state, batch, sums)
            if work.saves:
                files.ledger(batch.step, batch.epoch, batch.row_ids, ())
                if batch.step % work.steps == 0:
                    files.sync()
                    progress = Progress(batch.step, work.batch, ((0.0,),), 0, 0)
                    saver.start(model, optimizer, progress, {"step": batch.step})
                elif batch.step % work.steps == work.steps - 1:
                    assert saver.finish() is None
            yield metrics_from_sums(sums.tolist(), weights)["loss"]

    _answer(line, model.attention_text, steps(), work)
    dist.destroy_process_group()


def trl_side(work: Work, line: Connection) -> None:
    """TRL's ORPOTrainer, stopped and gone on with by a callback."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    cuda = work.device == "cuda"
    n_steps = work.steps * (work.rounds + 1)
    attention = "flash_attention_2" if cuda and find_spec("flash_attn") else "sdpa"
    losses: list[float] = []

    class Rounds(TrainerCallback):  # type: ignore[misc]
        """Waits for its turn before a round, and says how long the round took after it."""

        room_bytes = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % work.steps == 0:
                line.recv()
                take_room(self.room_bytes)
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The first round, which does not count, logs each step: its losses are compared.
            control.should_log = state.global_step <= work.steps
            if state.global_step % work.steps == 0 and state.global_step > work.steps:
                self._done()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))
                if len(losses) == work.steps:
                    self._done()

        def _done(self) -> None:
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.started
            self.room_bytes = leave_room(work.device)
            line.send({"seconds": seconds, "losses": losses})

    arguments = ORPOConfig(
        output_dir=f"{work.folder}/trl",
        per_device_train_batch_size=work.batch,
        max_steps=n_steps,
        max_length=MAX_LENGTH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        bf16=cuda or work.bf16,
        gradient_checkpointing=work.gradient_checkpointing,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            f"{work.folder}/model",
            dtype=torch.float32,
            attn_implementation=attention,
        ),
        args=arguments,
        train_dataset=Dataset.from_dict(json.loads(Path(work.folder, "pairs.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(f"{work.folder}/model"),
        callbacks=[Rounds()],
    )
    line.send(attention)
    trainer.train()
    line.send(peak_memory_bytes(work.device))


def through_ray_side(work: Work, line: Connection) -> None:
    """`jobs/train.py` with a Ray of its own, all of whose processes stand still between rounds.

    A round ends with its last step's line in metrics.jsonl; what is done after that until the
    processes stand still is part of the next round. It tells no losses and no memory.
    """
    settings = {
        "model_name_or_path": f"{work.folder}/model",
        "train_files": f"{work.folder}/pairs.jsonl",
        "output_dir": f"{work.folder}/runs",
        "run_name": "run",
        "shuffle": "false",
        "max_length": MAX_LENGTH,
        "per_device_train_batch_size": work.batch,
        "max_tokens_per_microbatch": work.budget_tokens,
        "learning_rate": LEARNING_RATE,
        "max_steps": work.steps * (work.rounds + 1),
        "logging_steps": work.steps,
    }
    command = [sys.executable, str(ROOT / "jobs" / "train.py")]
    command += [f"{key}={value}" for key, value in settings.items()]
    metrics = Path(work.folder, "runs", "run", "metrics.jsonl")
    line.send("the bare step's")
    line.recv()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with subprocess.Popen(command) as driver:
        try:
            _stop_and_go(work, line, driver, metrics)
        except BaseException:
            _signal_all(_tree(driver), signal.SIGCONT)
            driver.terminate()
            raise
    if driver.returncode:
        raise RuntimeError(f"jobs/train.py ended with {driver.returncode}")
    line.send(0)


def _stop_and_go(
    work: Work, line: Connection, driver: "subprocess.Popen[bytes]", metrics: Path
) -> None:
    began = time.time()
    for done in range(1, work.rounds + 2):
        while len(times := _logged_times(metrics)) < done:
            if driver.poll() is not None:
                raise RuntimeError(f"jobs/train.py ended with {driver.returncode}")
            time.sleep(0.02)
        processes = _tree(driver)
        _signal_all(processes, signal.SIGSTOP)
        stopped = time.time()
        line.send({"seconds": times[done - 1] - began, "losses": []})
        if done <= work.rounds:
            line.recv()
        # As if the round had begun as much earlier as its first steps took before the stop.
        began = time.time() - (stopped - times[done - 1])
        _signal_all(processes, signal.SIGCONT)


def _tree(driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """A driver with all that it started; empty once it has ended."""
    try:
        process = psutil.Process(driver.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _logged_times(metrics: Path) -> list[float]:
    """When each line of a metrics.jsonl so far was logged, seconds since 1970."""
    if not metrics.exists():
        return []
    return [json.loads(text)["time"] for text in metrics.read_text().split("\n")[:-1]]


def _signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _answer(line: Connection, attention: str, losses: Iterator[float], work: Work) -> None:
    """Say how it attends, take one round each time it is asked to, and say what memory it took."""
    line.send(attention)
    room_bytes = 0
    for _ in range(work.rounds + 1):
        line.recv()
        take_room(room_bytes)
        started = time.perf_counter()
        done = [next(losses) for _ in range(work.steps)]
        seconds = time.perf_counter() - started
        room_bytes = leave_room(work.device)
        line.send({"seconds": seconds, "losses": done})
    line.send(peak_memory_bytes(work.device))


def leave_room(device: str) -> int:
    """Give back what the allocator keeps of a round: the other side is on the same GPU.

    Returns:
        Bytes that were given back.
    """
    if device != "cuda":
        return 0
    kept = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    return kept - torch.cuda.memory_reserved()


def take_room(n_bytes: int) -> None:
    """Get it back before the clock runs: else a round would pay for it, a short one the more."""
    if n_bytes:
        torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(device: str) -> int:
    """The most memory this process held: allocated on a GPU, of its last round; else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    (peak,) = (
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(peak) * 1024


def run_side(name: str, work: Work, line: Connection) -> None:
    """Run one side in a process of its own; what it prints goes into a file of the folder."""
    log = os.open(f"{work.folder}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        SIDES[name](work, line)
    except BaseException:
        line.send({"error": traceback.format_exc()})
        raise


SIDES: dict[str, Callable[[Work, Connection], None]] = {
    "orpo_ray": orpo_ray_side,
    "trl": trl_side,
    "through_ray": through_ray_side,
}
