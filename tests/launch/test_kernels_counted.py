"""benchmarks/kernels.py: what it counts is what is there, and it says what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import without_gpu

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
needs_cuda_build = pytest.mark.skipif(bool(without_gpu.missing()), reason=without_gpu.missing() or "there")

COUNTS = """
import json, sys, torch
from benchmarks import without_gpu
without_gpu.pretend()
mode = without_gpu.FakeTensorMode()
with without_gpu.on_it(mode):
    a, b, weight = (torch.empty(512, 512, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

def gate(a, b):
    return torch.nn.functional.silu(a) * b

def product(a, b):
    return gate(a, b) @ weight.detach()

def unfused(a, b):
    return gate(a, b) - gate(a, b).amax()

def broken(a, b):
    print("broken")
    return gate(a, b)

found = {}
for function in (gate, product, unfused):
    graphs = without_gpu.graphs(function, a, b, mode=mode)
    found[function.__name__] = [(one.triton, one.extern, one.triton_bytes) for one in graphs]
try:
    without_gpu.graphs(broken, a, b, mode=mode)
except torch._dynamo.exc.Unsupported:
    found["broken"] = "refused"
print(json.dumps(found))
"""


@pytest.mark.skipif(not without_gpu.missing(), reason="this Python can")
def test_without_a_cuda_build_one_sentence_says_what_is_needed():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels"], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "benchmarks.kernels: torch here" in done.stderr


@pytest.mark.slow
@needs_cuda_build
def test_kernels_and_bytes_are_those_of_a_reckoning_by_hand(tmp_path: Path):
    script = tmp_path / "counts.py"
    script.write_text(COUNTS)
    done = subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tensor = 512 * 512 * 2
    assert found["gate"][0] == [1, [], 3 * tensor]  # two read, one written
    assert found["gate"][1] == [1, [], 5 * tensor]  # both and the gradient read, two gradients written
    assert found["product"][0][:2] == [1, ["mm"]]
    assert found["unfused"][0][0] > 1  # the largest of all elements is not known in the kernel that makes them
    assert found["broken"] == "refused"


@pytest.mark.slow
@needs_cuda_build
def test_a_block_of_8b_is_ten_kernels(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--output", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "kernels.json").read_text())["counted"]}
    block = rows["block, rope"]
    assert (block["forward generated"], block["backward generated"]) == (5, 5)
    assert block["forward bytes"] + block["backward bytes"] < 450_000
    assert rows["fold, per parameter"]["bytes"] == pytest.approx(6, rel=0.01) and rows["fold, per parameter"]["generated"] == 1
    assert rows["fold's mean over ranks, per parameter"]["bytes"] == pytest.approx(6, rel=0.01)
    assert rows["fold's move, per parameter"]["bytes"] == pytest.approx(6, rel=0.01)
