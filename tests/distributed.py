"""Running a function on several gloo processes, as training workers do, without Ray."""

import contextlib
import multiprocessing
import os
import pickle
import secrets
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Every rank is a fork of one process that has these, which take seconds to import, and no threads.
_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(
    ["torch.distributed.checkpoint", "transformers", "orpo_ray.training.loop"]
)


class Ranks:
    """Processes that run one function after another, each time with a new process group.

    What a process imports and caches on its first run is much of the cost of a small one, so
    processes are kept until a run fails.
    """

    def __init__(self) -> None:
        self._kept: list[_Rank] = []

    def run(
        self,
        n_ranks: int,
        function: Callable[..., Any],
        *args: Any,
        backend: str = "gloo",
        new_processes: bool = False,
    ) -> list[Any]:
        """Run `function(*args)` in `n_ranks` processes that share a process group.

        Args:
            n_ranks: processes, each with one thread.
            function: importable by name; its return value must be picklable.
            args: handed to every rank.
            backend: of the process group; `nccl`, on GPUs, implies new processes.
            new_processes: use processes that have run nothing else. For runs that fail, resume
                as a new process does, limit resources, or change settings of torch.

        Returns:
            What each rank returned, by rank.
        """
        if backend == "gloo" and not new_processes:
            self._kept += [_Rank(_FORK_SERVER) for _ in range(n_ranks - len(self._kept))]
            answers = _answers(self._kept[:n_ranks], backend, function, args)
            if any(isinstance(answer, _Failure) for answer in answers):
                self.end()
        else:
            # What the fork server imports asks CUDA for its devices: no fork may use them then.
            context = multiprocessing.get_context("spawn") if backend == "nccl" else _FORK_SERVER
            ranks = [_Rank(context) for _ in range(n_ranks)]
            answers = _answers(ranks, backend, function, args)
            for rank in ranks:
                rank.end()
        errors = [answer.text for answer in answers if isinstance(answer, _Failure)]
        assert not errors, "\n".join(errors)
        return answers

    def end(self) -> None:
        """End the processes that are kept."""
        for rank in self._kept:
            rank.end()
        self._kept = []


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


class _Rank:
    """One process and the pipe to it."""

    def __init__(self, context: Any) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def end(self) -> None:
        self.pipe.close()  # a process that waits for its next function ends
        self.process.join(10)
        self.process.kill()
        self.process.join()


def _answers(
    ranks: list[_Rank], backend: str, function: Callable[..., Any], args: Any
) -> list[Any]:
    """What each rank returned, or its failure."""
    port = _free_port()
    for number, rank in enumerate(ranks):
        place = {
            "RANK": str(number),
            "WORLD_SIZE": str(len(ranks)),
            "LOCAL_RANK": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        rank.pipe.send((dict(os.environ) | place, backend, pickle.dumps((function, args))))
    answers = []
    for number, rank in enumerate(ranks):
        try:
            answers.append(rank.pipe.recv())
        except (EOFError, OSError):
            rank.process.join()
            code = rank.process.exitcode
            answers.append(_Failure(f"rank {number} ended with exit code {code}"))
    return answers


def _free_port() -> int:
    """A free port below those that connections get, so that none takes it before the ranks do."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _serve(pipe: Connection) -> None:
    """Run what comes through the pipe until it is closed, or until something fails.

    A rank that failed ends, so that the others lose their connection to it and fail too.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            environment, backend, work = pipe.recv()
        except EOFError:
            return
        os.environ.clear()  # it is that of the process that was forked, or of the work before
        os.environ |= environment
        try:
            function, args = pickle.loads(work)
            dist.init_process_group(backend)
            answer = function(*args)
            dist.destroy_process_group()
        except Exception:
            pipe.send(_Failure(f"rank {environment['RANK']}:\n{traceback.format_exc()}"))
            return
        pipe.send(answer)
