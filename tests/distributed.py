"""Running a function on several gloo processes, as training workers do, without Ray."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Every rank is a fork of one process that has these, which take seconds to import, and no threads.
_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(
    ["torch.distributed.checkpoint", "transformers", "orpo_ray.training.loop"]
)


def run_ranks(
    n_ranks: int, function: Callable[..., Any], *args: Any, backend: str = "gloo"
) -> list[Any]:
    """Run `function(*args)` in `n_ranks` processes that share a process group.

    Args:
        n_ranks: processes, each with one thread.
        function: importable by name; its return value must be picklable.
        args: handed to every rank.
        backend: of the process group; `nccl` on GPUs.

    Returns:
        What each rank returned, by rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # What the fork server imports asks CUDA for its devices, after which no fork may use them.
        context = multiprocessing.get_context("spawn") if backend == "nccl" else _FORK_SERVER
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, n_ranks, port, dict(os.environ), backend, folder, function, args),
            )
            for rank in range(n_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        answers = []
        for rank in range(n_ranks):
            path = Path(folder, str(rank))
            assert path.exists(), f"rank {rank} ended with exit code {ranks[rank].exitcode}"
            answers.append(pickle.loads(path.read_bytes()))
    errors = [answer for answer in answers if isinstance(answer, _Failure)]
    assert not errors, "\n".join(error.text for error in errors)
    return answers


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(
    rank: int,
    n_ranks: int,
    port: int,
    environment: dict[str, str],
    backend: str,
    folder: str,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.clear()  # it is that of the process that was forked
    os.environ |= environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(backend)
        answer = function(*args)
        dist.destroy_process_group()
    except Exception:
        answer = _Failure(f"rank {rank}:\n{traceback.format_exc()}")
    Path(folder, str(rank)).write_bytes(pickle.dumps(answer))
