"""Sides of a benchmark as processes of their own, which take their rounds in turn."""

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sides import run_side
from workload import Work


@dataclass(frozen=True)
class Rounds:
    """What one side did: seconds of the rounds that count, first losses, most memory held."""

    attention: str
    seconds: list[float]
    losses: list[float]
    peak_memory_bytes: int


class SideFailedError(SystemExit):
    """A side of a comparison failed; the message is its traceback."""

    def __init__(self, side: str, text: str) -> None:
        super().__init__(text)
        self.side = side
        self.out_of_memory = "OutOfMemoryError" in text


def in_turn(*sides: tuple[str, Work]) -> list[Rounds]:
    """Start the sides and let them take their rounds one after the other.

    Raises:
        SideFailedError: when one of them fails; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    names, lines, processes = [name for name, _ in sides], [], []
    for name, work in sides:
        here, there = context.Pipe()
        process = context.Process(target=run_side, args=(name, work, there), daemon=True)
        process.start()
        there.close()
        lines.append(here)
        processes.append(process)
    try:
        attention = [_received(*side) for side in zip(names, lines, strict=True)]
        answers: list[list[dict[str, Any]]] = [[] for _ in sides]
        for _ in range(sides[0][1].rounds + 1):
            for name, line, answer in zip(names, lines, answers, strict=True):
                line.send("go")
                answer.append(_received(name, line))
        peaks = [_received(*side) for side in zip(names, lines, strict=True)]
    except SideFailedError:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
    return [
        Rounds(chosen, [a["seconds"] for a in answer[1:]], answer[0]["losses"], peak)
        for chosen, answer, peak in zip(attention, answers, peaks, strict=True)
    ]


def _received(name: str, line: Connection) -> Any:
    """The next thing a side says.

    Raises:
        SideFailedError: when it failed.
    """
    try:
        answer = line.recv()
    except EOFError:
        raise SideFailedError(name, f"{name} ended without a word") from None
    if isinstance(answer, dict) and "error" in answer:
        raise SideFailedError(name, answer["error"])
    return answer
