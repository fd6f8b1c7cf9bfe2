"""Two nodes for real: two network namespaces joined by a cable (a veth pair), a torchrun in each.

Needs the right to make network namespaces (root, or CAP_SYS_ADMIN and CAP_NET_ADMIN); skipped with the reason elsewhere.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.checkpoints import read_tensor, tensor_names

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parent.parent.parent
CABLE = "cable0"
ONE_CORE = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
"""A rank takes its share of the cores it may use, and sums in another order with another number of threads."""
LONG = ("train.steps=40", "checkpoint.every_steps=5", "checkpoint.keep=10", "checkpoint.asynchronous=false")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """The names of two joined network namespaces, taken down afterwards."""
    if shutil.which("ip") is None or shutil.which("taskset") is None:
        pytest.skip("needs the programs ip (iproute2) and taskset (util-linux) to make two nodes of one computer")
    made = tuple(f"tiglon-{os.getpid()}-{letter}" for letter in "ab")
    try:
        for name in made:
            result = ip("netns", "add", name)
            if result.returncode:
                pytest.skip(f"no right to make network namespaces: {result.stderr.strip()}")
        result = ip("link", "add", CABLE, "netns", made[0], "type", "veth", "peer", "name", CABLE, "netns", made[1])
        if result.returncode:
            pytest.skip(f"no right to make a veth pair: {result.stderr.strip()}")
        for name, address in zip(made, ADDRESSES, strict=True):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE).returncode == 0
            for device in (CABLE, "lo"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield made[0], made[1]
    finally:
        end(*made)
        for name in made:
            ip("netns", "delete", name)


def start(node: int, nodes: tuple[str, str], ranks: int, log: Path, configuration: str, *overrides: str) -> subprocess.Popen:
    """torchrun on one node, as `tiglon slurm` starts it; in a session of its own so that it can be killed with its ranks."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE,
        # torch 2.13: else a node that joins a later round waits for an address that only the first round was told
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    command = [
        "ip", "netns", "exec", nodes[node], *ONE_CORE, sys.executable, "-m", "torch.distributed.run",
        "--nnodes=2", f"--nproc-per-node={ranks}", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--local-addr={ADDRESSES[node]}",
        f"--rdzv-conf=is_host={int(node == 0)}",
        "-m", "launch.train", configuration, *overrides,
    ]  # fmt: skip
    with log.open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def end(*names_of_nodes: str) -> None:
    """Power off: kill everything that runs in these namespaces (torchrun's ranks are in sessions of their own)."""
    for name in names_of_nodes:
        while alive := ip("netns", "pids", name).stdout.split():
            for number in alive:
                try:
                    os.kill(int(number), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


def finish(tmp_path: Path, *processes: subprocess.Popen, timeout_seconds: float = 300) -> None:
    """Wait for nodes that should end well."""
    for number, process in enumerate(processes):
        assert process.wait(timeout_seconds) == 0, (tmp_path / f"node-{number}.log").read_text()[-5000:]


def one_node(ranks: int, configuration: str, *overrides: str) -> None:
    command = [*ONE_CORE, sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "launch.train", configuration, *overrides],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def losses(directory: Path) -> dict[int, float]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def assert_same_run(one: Path, other: Path, step: int) -> None:
    assert losses(one) == losses(other)
    assert len(losses(one)) == step
    first, second = (directory / f"checkpoints/step-{step:08d}" for directory in (one, other))
    assert tensor_names(first).keys() == tensor_names(second).keys()
    assert all(read_tensor(first, name).equal(read_tensor(second, name)) for name in tensor_names(first))


def wait_for(path: Path, process: subprocess.Popen, timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_node_comes_back_and_the_run_ends_with_the_same_bits(nodes, configuration: str, tmp_path: Path):
    """2 nodes x 1 rank; the second is killed in mid-run and started again: the curve and the weights are one node's."""
    one_node(2, configuration, *LONG, f"run.dir={tmp_path}/one")
    both = [start(node, nodes, 1, tmp_path / f"node-{node}.log", configuration, *LONG) for node in (0, 1)]
    wait_for(tmp_path / "run/checkpoints/step-00000010", both[0])
    end(nodes[1])
    both[1].wait()
    assert not (tmp_path / "run/checkpoints/step-00000040").exists(), "too fast to be killed in mid-run"
    both[1] = start(1, nodes, 1, tmp_path / "node-1.log", configuration, *LONG)
    finish(tmp_path, *both)
    assert_same_run(tmp_path / "run", tmp_path / "one", 40)
    assert "resumed from" in (tmp_path / "node-0.log").read_text()


@pytest.mark.slow
def test_a_cut_cable_ends_in_the_same_bits_when_it_is_joined_again(nodes, configuration: str, tmp_path: Path):
    """2 nodes x 2 ranks, tensor parallel inside each; the link goes down, the ranks give up, the link comes back."""
    options = (
        *LONG, "parallel.tensor_parallel_size=2", "parallel.timeout_seconds=20", "health.hang_seconds=15",
    )  # fmt: skip
    one_node(4, configuration, *options, f"run.dir={tmp_path}/one")
    both = [start(node, nodes, 2, tmp_path / f"node-{node}.log", configuration, *options) for node in (0, 1)]
    wait_for(tmp_path / "run/checkpoints/step-00000010", both[0])
    ip("-n", nodes[1], "link", "set", CABLE, "down")
    time.sleep(25)
    ip("-n", nodes[1], "link", "set", CABLE, "up")
    if both[1].wait(300):  # its agent lost the rendezvous at the other end of the cable
        both[1] = start(1, nodes, 2, tmp_path / "node-1.log", configuration, *options)
    finish(tmp_path, *both)
    assert_same_run(tmp_path / "run", tmp_path / "one", 40)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_two_nodes_of_two_ranks_are_one_node_bit_for_bit(nodes, configuration: str, tmp_path: Path, size: int):
    """Tensor-parallel groups inside the nodes, or data parallelism over all four ranks."""
    options = (f"parallel.tensor_parallel_size={size}",)
    one_node(4, configuration, *options, f"run.dir={tmp_path}/one")
    both = [start(node, nodes, 2, tmp_path / f"node-{node}.log", configuration, *options) for node in (0, 1)]
    finish(tmp_path, *both)
    assert_same_run(tmp_path / "run", tmp_path / "one", 12)


@pytest.mark.slow
def test_zero_3_copies_the_weights_inside_nodes_and_stays_one_node_bit_for_bit(nodes, configuration: str, tmp_path: Path):
    """hpZ is on by itself where data-parallel ranks span nodes; layers large enough for DeepSpeed to part with."""
    options = ("parallel.zero_stage=3", "model.hidden_size=320", "model.intermediate_size=320", "model.num_key_value_heads=4")
    one_node(4, configuration, *options, f"run.dir={tmp_path}/one")
    both = [start(node, nodes, 2, tmp_path / f"node-{node}.log", configuration, *options) for node in (0, 1)]
    finish(tmp_path, *both)
    assert "ZeRO 3, a copy of the weights on every 2 data ranks (hpZ)" in (tmp_path / "node-0.log").read_text()
    assert_same_run(tmp_path / "run", tmp_path / "one", 12)
