"""Proves and measures tiglon on one GPU, in ten minutes and without a network.

    python -m benchmarks.gpu [--seconds S] [--only PART ...] [--skip PART ...] [--output FOLDER]
    python -m benchmarks.gpu --device cpu --tiny          the same parts with small sizes, where there is no GPU

Parts in order of worth, each a process with a limit of its own; what does not fit into S seconds is not begun. Every
figure is a line of FOLDER/gpu.jsonl the moment it is known, so a part that fails, hangs or is killed costs nothing but
itself. What parts print goes to FOLDER/gpu.log. At the end FOLDER/gpu.md is made from all the lines there are, of earlier
calls too; for the repository, --output docs/results. Where there is no network: `bash benchmarks/wheels.sh` before
(docs/speed.md).
"""

import argparse
import fcntl
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu import page
from benchmarks.gpu.figures import Part, append
from launch import runtime
from launch.exit_status import Status
from launch.interrupts import LAUNCHER

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Plan:
    """When a part runs."""

    name: str
    function: str
    """module:function, under benchmarks.gpu."""
    limit_seconds: float
    least_seconds: float
    """Seconds that must be left to start it."""
    beside: bool = False
    """It runs beside the part before it: it checks correctness and measures no time."""


PLAN = (
    Plan("machine", "machine:measure", 30, 5),
    Plan("smoke", "smoke:measure", 150, 40),
    Plan("tests", "tests:measure", 150, 40, beside=True),
    Plan("step-8b", "steps:measure_8b", 130, 60),
    Plan("step-1b", "steps:measure_1b", 130, 50),
    Plan("attention", "attention:measure", 130, 25),
    Plan("ceilings", "ceilings:measure", 60, 20),
    Plan("update", "update:measure", 40, 15),
    Plan("largest", "largest:measure", 100, 60),
    Plan("peers-8b", "peers:measure_8b", 120, 60),
    Plan("peers-1b", "peers:measure_1b", 150, 60),
    Plan("stall", "stall:measure", 60, 20),
    Plan("graphs", "tests:measure_graphs", 120, 60),
)
"""Most valuable first. Those up to attention fit into one call in any case; update is compared with a copy of the ceilings."""
NAMES = [plan.name for plan in PLAN]
STOPS = (signal.SIGTERM, signal.SIGHUP)


@dataclass
class Running:
    """A running part."""

    plan: Plan
    process: "subprocess.Popen[bytes]"
    begun: float
    limit: float
    scratch: str
    """Its folder, under the system's temporary ones."""


class Run:
    """One call: starts parts, ends those that take too long, and notes how each ended."""

    def __init__(self, given: argparse.Namespace, card: str):
        self.given, self.card, self.folder = given, card, given.output.resolve()
        if self.folder.is_file():
            raise ValueError(f"--output {self.folder} is a file; give a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begun, self.name = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S")
        self.log: IO[bytes] = (self.folder / "gpu.log").open("ab")
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # parts inherit it
        except BlockingIOError:
            raise ValueError(f"another call writes to {self.folder}; wait for it, or give another --output") from None
        self.running: list[Running] = []

    def left(self) -> float:
        """Seconds."""
        return self.given.seconds - (time.monotonic() - self.begun)

    def note(self, part: str, what: str, **values: object) -> None:
        """Print a line."""
        append(self.folder, {"run": self.name, "part": part, "what": what, "at": round(time.time(), 1), **values})

    def start(self, plan: Plan) -> None:
        """Start a part, with the remaining time as its limit."""
        limit, scratch = min(plan.limit_seconds, self.left()), tempfile.mkdtemp(prefix="tiglon-gpu-")
        command = [sys.executable, "-m", "benchmarks.gpu.supervisor"]
        command += [sys.executable, "-m", "benchmarks.gpu", "--part", plan.name, "--run", self.name]
        command += ["--scratch", scratch, "--output", str(self.folder), "--device", self.given.device]
        command += ["--tiny"] if self.given.tiny else []
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment |= runtime.import_path()
        self.log.write(f"\n===== {plan.name}, {limit:.0f} s at most\n".encode())
        self.log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C reaches this process only
        )  # fmt: skip
        self.running.append(Running(plan, process, time.monotonic(), limit, scratch))

    def wait(self) -> None:
        """Wait until every part that was started has ended."""
        while self.running:
            for one in list(self.running):
                late = time.monotonic() - one.begun > one.limit
                if one.process.poll() is not None or late:
                    self.end(one, "out of time" if late and one.process.poll() is None else "")
            time.sleep(0.1)

    def end(self, one: Running, why: str = "") -> None:
        """Kill a part with all that it has started, and record how it ended."""
        assert one.process.stdin is not None
        one.process.stdin.close()
        status, seconds = one.process.wait(), round(time.monotonic() - one.begun, 1)
        with suppress(ProcessLookupError):  # what is left where the supervisor was killed itself
            os.killpg(one.process.pid, signal.SIGKILL)
        shutil.rmtree(one.scratch, ignore_errors=True)
        if not why and status:
            number = -status if status < 0 else status - 128
            why = f"killed by signal {number}" if number > 0 else f"ended with status {status}"
        self.note(one.plan.name, "end", seconds=seconds, **({"error": why} if why else {}))
        print(f"{one.plan.name}: {why or 'done'} after {seconds:.0f} s", flush=True)
        self.running.remove(one)

    def go(self, plans: list[Plan]) -> None:
        """All parts in order."""
        command = "python -m benchmarks.gpu " + shlex.join(sys.argv[1:])
        self.note("run", "begin", command=command, device=self.given.device, card=self.card, tiny=self.given.tiny)
        try:
            for plan in plans:
                if not plan.beside:
                    self.wait()
                if self.left() < plan.least_seconds:
                    self.note(plan.name, "end", error=f"not begun: {max(0.0, self.left()):.0f} s left")
                    print(f"{plan.name}: not begun, {max(0.0, self.left()):.0f} s left", flush=True)
                    continue
                self.start(plan)
            self.wait()
        finally:
            for number in (signal.SIGINT, *STOPS) if self.running else ():
                signal.signal(number, signal.SIG_IGN)  # once is enough
            for one in list(self.running):
                self.end(one, "interrupted")
            self.log.close()


def work(given: argparse.Namespace) -> None:
    """One part, in this process."""
    runtime.die_with_parent()
    os.environ.pop(LAUNCHER, None)  # processes started here are no parts
    plan = next(plan for plan in PLAN if plan.name == given.part)
    module, function = plan.function.split(":")
    part = Part(plan.name, given.run, given.output, given.scratch, torch.device(given.device), given.tiny)
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(part)
    except BaseException as error:
        part.say("failed", error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        raise


def main() -> int:
    """Run the parts, then print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=580, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PART", default=[], help=f"of {', '.join(NAMES)}")
    parser.add_argument("--skip", nargs="+", choices=NAMES, metavar="PART", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu", help="folder of gpu.jsonl, gpu.log and gpu.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: whether everything runs, not how fast")
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        work(given)
        return 0
    if not given.seconds > 0:
        raise ValueError(f"--seconds {given.seconds:g}: it is the time for everything together; give more than 0")
    plans = [plan for plan in PLAN if (plan.name in given.only or not given.only) and plan.name not in given.skip]
    if not plans:
        raise ValueError("--only and --skip leave no part to run; skip fewer")
    card = _card() if given.device == "cuda" else "CPU"
    if not card:
        raise ValueError("torch finds no GPU here; add --device cpu --tiny to try every part without one")
    run, status = Run(given, card), 0
    for number in STOPS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        run.go(plans)
    except (KeyboardInterrupt, SystemExit) as signalled:
        status = int(signalled.code or 0) if isinstance(signalled, SystemExit) else Status.INTERRUPTED
    finally:
        text = page.write(run.folder)
    files = f"figures: {run.folder}/gpu.jsonl, what the parts printed: {run.folder}/gpu.log, page: {run.folder}/gpu.md"
    if status:
        print(f"tiglon: interrupted; {files}", file=sys.stderr)
        return status
    print(f"\n{text}\n\n{files}")
    return int(page.failed(run.folder, run.name))


def _card() -> str:
    """The GPU's name, or "". Asked in another process: this one must not take memory of the GPU."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
