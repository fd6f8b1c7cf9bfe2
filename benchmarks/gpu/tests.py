"""The tests that only a GPU can run, by pytest as it is installed there."""

import os
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.gpu.figures import Part

CORE = [
    "tests/model", "tests/trainer", "tests/launch/test_train.py",
    "tests/test_gpu.py::test_rounding_draws_what_a_cpu_draws", "tests/test_gpu.py::test_no_step_waits_for_the_gpu",
    "tests/test_gpu.py::test_the_curve_is_that_of_a_cpu",
]  # fmt: skip
GRAPHS = ["tests/test_gpu.py"]
SMALL = [f"tests/model/attention/kernels/test_{name}.py" for name in ("flash", "cudnn", "dispatch")]
"""What a CPU runs in their place, so that this part itself is tried."""


def measure(part: Part) -> None:
    """Everything but CUDA graphs."""
    run(part, SMALL if part.tiny else CORE)


def measure_graphs(part: Part) -> None:
    """CUDA graphs, off by default."""
    run(part, SMALL if part.tiny else [*GRAPHS, "-k", "graphs or replays"])


def run(part: Part, targets: list[str]) -> None:
    """Run tests and write every failure down as it comes. Plugins of the image warn, and warnings are errors here."""
    if missing := [module for module in ("pytest", "pytest_timeout", "hypothesis") if find_spec(module) is None]:
        part.say("tests", error=f"{', '.join(missing)} not found in this Python: pip install -e '.[test]'")
        return
    marks = [] if part.tiny else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", *marks, "-v", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    command += ["--timeout", "95"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if find_spec("xdist"):
        command += ["-p", "xdist.plugin", "-n", "2" if part.tiny else "8"]
    process = subprocess.Popen(
        [*command, *targets], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for line in process.stdout:
        print(line, end="", flush=True)
        for word, key in ((" PASSED", "passed"), (" FAILED", "failed"), (" SKIPPED", "skipped"), (" ERROR", "failed")):
            counts[key] += word in line and "::" in line and not line.startswith(("FAILED", "ERROR", "SKIPPED"))
        if line.startswith(("FAILED", "ERROR")):
            part.say("failed test", error=line.strip()[:300])
    status = process.wait()
    wrong = {"error": f"pytest ended with status {status}"} if status else {}
    part.say("tests", **counts, **wrong)
