"""Ray on this machine with several nodes that can be killed, drained and replaced."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import ray
from ray.cluster_utils import Cluster

# Read by every Python process of the cluster when it starts: waits for an order in a file named
# by its process id, and carries it out inside the training thread.
_INJECTOR = """
import os, threading, time

def _obey(folder):
    import ctypes, sys
    path = os.path.join(folder, str(os.getpid()))
    while not os.path.exists(path):
        time.sleep(0.05)
    order = open(path).read()
    if order == "exit":
        os._exit(0)
    for ident, frame in sys._current_frames().items():
        while frame is not None:
            if frame.f_code.co_filename.endswith("orpo_ray/training/loop.py"):
                kind = ctypes.py_object(RuntimeError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_long(ident), kind)
                return
            frame = frame.f_back

if "FAULTS_FOLDER" in os.environ:
    thread = threading.Thread(target=_obey, args=(os.environ["FAULTS_FOLDER"],), daemon=True)
    thread.start()
"""


class FaultCluster:
    """A head without CPUs and two nodes with one CPU each.

    Args:
        folder: for the orders given to processes; created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[Any] = []

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        (self._folder / "sitecustomize.py").write_text(_INJECTOR)
        os.environ["FAULTS_FOLDER"] = str(self._folder)
        paths = [str(self._folder), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """Of the head."""
        return str(self._cluster.address)

    def add_node(self) -> None:
        """A new node with one CPU."""
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def heal(self) -> None:
        """Back to two living nodes whose CPUs are free."""
        while len(self._nodes) < 2:
            self.add_node()
        deadline = time.monotonic() + 120
        while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)

    def kill_node(self) -> None:
        """SIGKILL all processes of the newest node."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def terminate_node(self) -> None:
        """SIGTERM the raylet of the newest node."""
        node = self._nodes.pop()
        [raylet] = node.all_processes["raylet"]
        raylet.process.send_signal(signal.SIGTERM)
        raylet.process.wait(timeout=60)
        self._cluster.remove_node(node, allow_graceful=True)

    def drain_node(self, deadline_s: int) -> None:
        """Tell the cluster that the newest node will be taken away."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
        command += ["--address", self.address, "--node-id", self._nodes[-1].node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run(command, check=True, capture_output=True)

    def inject(self, pid: int, order: str) -> None:
        """Have a process raise an `exception` in its training thread, or `exit` with code 0."""
        path = self._folder / str(pid)
        path.with_suffix(".tmp").write_text(order)
        path.with_suffix(".tmp").replace(path)
