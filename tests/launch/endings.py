"""End training at random moments in every way it can end, and hold what was said and what comes out against unbroken runs."""

import contextlib
import itertools
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import psutil
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from data.storage import is_remote, join_address, open_store
from launch.checkpoints import find_checkpoint, read_tensor, tensor_names
from tests.cut_store import CutStore, cut_store
from tests.launch.crash import make_run
from tests.launch.screens import Seen, faults
from tests.launch.test_full_disk import fill
from trainer.checkpoint.directory import saved_steps
from trainer.monitoring.records import FILE_NAME, read_records

ROOT = Path(__file__).parent.parent.parent
STEPS, SAVE_EVERY, LOOK_EVERY, KEEP = 120, 6, 12, 2
KINDS = (
    "sigint",
    "sigterm",
    "sighup",
    "sigusr1",
    "double-sigint",
    "closed-pipe",
    "kill-command",
    "kill-rank",
    "kill-all",
    "full-disk",
    "store-gone",
)
ENGINES = {
    "zero": ("parallel.engine=zero",),
    "fold": ("parallel.engine=fold", "optimizer.name=tiger", "optimizer.max_grad_norm=0"),
}
LIMIT_SECONDS = 240
"""No command may take longer, ended or not."""
LEFT_SECONDS = 10
"""After a command its ranks may still be there this long."""
STARTING = 0.25
"""Share of the endings that are to come before the first step, which takes as long as all others together."""
_MARK = "TIGLON_ENDINGS_TEST"
"""Variable of the environment by which the processes of one command are known, whatever became of their parents."""


@dataclass(frozen=True)
class Ending:
    """How and when a command is ended."""

    kind: str
    moment: float
    """In [0, 1): below STARTING of the way to the first step, from there on of the way from that to the end."""
    detail: float
    """A second number in [0, 1): which rank, how long between two signals, until there is room again."""


@dataclass(frozen=True)
class Chain:
    """Endings that meet one run after another, until it is let finish."""

    ranks: int
    engine: str
    endings: tuple[Ending, ...]


@dataclass
class Outcome:
    """What came of one ending."""

    kind: str
    ranks: int
    engine: str
    when: str
    """starting, training or leaving."""
    status: int
    reached: int | None
    """The last step on its screen."""
    resumed: int | None = None
    """The step that the next command resumed from; None = from the beginning, or it said nothing."""
    faults: list[str] = field(default_factory=list)
    screen: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """An unbroken run."""

    directory: Path
    startup_seconds: float
    training_seconds: float
    lines: int
    """On its screen."""


def plan(count: int, seed: int, only: str = "") -> list[Chain]:
    """Chains of `count` endings in all, every kind as often as any other, at moments spread alike over the life of a run."""
    draw = random.Random(seed)
    kinds = [only] if only else KINDS
    each = math.ceil(count / len(kinds))
    numbers = [divmod(number, len(kinds)) for number in range(count)]
    endings = [Ending(kinds[kind], (nth + draw.random()) / each, draw.random()) for nth, kind in numbers]
    draw.shuffle(endings)
    chains = []
    while endings:
        length = draw.randint(1, 4)
        taken, endings = tuple(endings[:length]), endings[length:]
        ranks = 2 if "kill-rank" in [ending.kind for ending in taken] else draw.choice((1, 2))
        chains.append(Chain(ranks, draw.choice(tuple(ENGINES)), taken))
    return chains


class Command:
    """`tiglon train`, started as a user starts it, with its screen in a pipe.

    Args:
        arguments: after `train`.
        lines: read so many of the screen, then close it; None = all.
    """

    def __init__(self, arguments: list[str], lines: int | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self.first_step: float | None = None
        """When the first step was on the screen."""
        self.closed = threading.Event()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), _MARK: self.mark}
        # signals as a terminal leaves them: what this process ignores, its children would
        command = ["env", "--default-signal", sys.executable, "-m", "launch", "train", *arguments]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()

    def _read(self, limit: int | None) -> None:
        screen = self.process.stderr
        assert screen is not None
        with screen:
            for line in itertools.islice(screen, limit):
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                if self.first_step is None and self.lines[-1].startswith("step "):
                    self.first_step = time.monotonic()
        if len(self.lines) == limit:
            self.closed.set()

    def wait(self) -> int:
        """The exit status.

        Raises:
            TimeoutError: it took longer than LIMIT_SECONDS. It is killed, with its ranks.
        """
        try:
            status = self.process.wait(max(0.1, self.began + LIMIT_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"it was still going after {LIMIT_SECONDS} s") from None
        return status

    def left(self) -> list[str]:
        """Processes that are still there LEFT_SECONDS after the command has ended; they are killed."""
        deadline = time.monotonic() + LEFT_SECONDS
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        words = []
        for process in found:
            with contextlib.suppress(psutil.Error):
                words.append(f"{process.pid} ({' '.join(process.cmdline()[1:5])})")
        self.kill()
        self._reader.join(5)
        return words

    def kill(self) -> None:
        """SIGKILL to everything of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def processes(self) -> list[psutil.Process]:
        """The command and everything that it started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Its rank processes, where it has any beside itself, in order."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if "RANK" in process.environ():
                    found[process.pid] = (int(process.environ()["RANK"]), process)
        heads = [entry for entry in found.values() if entry[1].ppid() not in found]
        return [process for _, process in sorted(heads, key=lambda entry: entry[0])]


@dataclass
class Place:
    """Where the runs of a chain lie."""

    root: Path
    """Run directories are made here: a small disk of its own, where the chain fills one up."""
    store: CutStore | None
    """For the checkpoints, where the chain loses one."""

    def address(self, directory: Path) -> str:
        """Of the checkpoints of the run in a directory."""
        return str(directory / "checkpoints") if self.store is None else join_address(self.store.address, directory.name)

    def spoil(self, kind: str) -> None:
        """Fill the disk or cut the store off."""
        if kind == "full-disk":
            fill(self.root / "filler")
        elif self.store is not None:
            self.store.cut()

    def restore(self) -> None:
        """Give back what was taken away."""
        (self.root / "filler").unlink(missing_ok=True)
        if self.store is not None:
            self.store.restore()


@contextmanager
def place(chain: Chain, folder: Path) -> Iterator[Place]:
    """What a chain needs: a small disk, a store that can be cut off, or just a directory.

    Raises:
        PermissionError: a disk is needed and none may be mounted.
    """
    kinds = {ending.kind for ending in chain.endings}
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        if "full-disk" in kinds:
            mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tiglon", str(folder)]
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PermissionError(f"full-disk needs the right to mount a file system: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        yield Place(folder, stack.enter_context(cut_store()) if "store-gone" in kinds else None)


class Endings:
    """All chains over one corpus, each held against the unbroken run of its ranks and engine.

    Args:
        folder: everything is written below it.
        tell: takes a line on what happens.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder, self._tell = folder, tell
        self._references: dict[tuple[int, str], Reference] = {}
        self._configuration = make_run(folder, STEPS)
        self.compared = 0
        """Runs that came to their end and were compared."""

    def chain(self, chain: Chain, number: int) -> list[Outcome]:
        """Do the endings of a chain and let the run finish. The outcomes, with all that was wrong."""
        reference = self._reference(chain)
        with place(chain, self._folder / f"chain-{number}") as where:
            found = _Disturbed(self._configuration, chain, reference, where, self._tell)
            for ending in chain.endings:
                found.end(ending)
            found.finish()
            self.compared += found.compared
            return found.outcomes

    def _reference(self, chain: Chain) -> Reference:
        key = (chain.ranks, chain.engine)
        if key not in self._references:
            directory = self._folder / f"whole-{chain.ranks}-{chain.engine}"
            command = Command(arguments(self._configuration, chain, directory, ""))
            status = command.wait()
            ended = time.monotonic()
            command.left()
            assert status == 0 and command.first_step is not None, "\n".join(["the unbroken run failed:", *command.lines])
            first = command.first_step
            seconds = (first - command.began, ended - first)
            self._references[key] = Reference(directory, *seconds, len(command.lines))
            self._tell(
                f"unbroken run, {chain.ranks} ranks, {chain.engine}: {seconds[0]:.1f} s to step 1, {seconds[1]:.1f} s on"
            )
        return self._references[key]


def arguments(configuration: str, chain: Chain, directory: Path, address: str) -> list[str]:
    """Of `tiglon train`."""
    options = [f"run.dir={directory}", f"checkpoint.every_steps={SAVE_EVERY}", f"checkpoint.keep={KEEP}"]
    options += [f"evaluate.every_steps={LOOK_EVERY}", "evaluate.tokens=4096", "log.sample_prompt=def "]
    options += ["log.sample_tokens=24", "log.tensorboard=true"]  # looks long enough to be met
    options += [f"checkpoint.directory={address}"] if is_remote(address) else []
    return [configuration, *(["--nproc", str(chain.ranks)] if chain.ranks > 1 else []), *options, *ENGINES[chain.engine]]


class _Disturbed:
    """The runs of one chain: a new directory after each that came to its end."""

    def __init__(
        self, configuration: str, chain: Chain, reference: Reference, where: Place, tell: Callable[[str], None]
    ) -> None:
        self._configuration, self._chain, self._reference, self._where = configuration, chain, reference, where
        self._tell = tell
        self._number = 0
        self._floor = 0
        self._open: list[Outcome] = []
        self._fresh = True
        self.outcomes: list[Outcome] = []
        self.compared = 0

    @property
    def _directory(self) -> Path:
        return self._where.root / f"run-{self._number}"

    @property
    def _address(self) -> str:
        return self._where.address(self._directory)

    def end(self, ending: Ending) -> None:
        """Start the command and end it so; again and earlier, if it was over before its moment came."""
        for attempt in range(4):
            command, when = self._started(replace(ending, moment=0.7**attempt * ending.moment))
            hit = when is not None
            outcome = self._close(command, ending.kind if hit else "", when or "leaving")
            if hit:
                return
        outcome.faults.append(f"the run was always over before its {ending.kind} came")

    def finish(self) -> None:
        """Start the command until it ends by itself with status 0."""
        for _ in range(3):
            if self._fresh:
                return
            command = Command(arguments(self._configuration, self._chain, self._directory, self._address))
            self._close(command, "", "leaving")
        if not self._fresh:
            self.outcomes[-1].faults.append("three starts more did not bring the run to its end")

    def _started(self, ending: Ending) -> tuple[Command, str | None]:
        """The command, and when in its life the ending came; None if it was over before."""
        self._fresh = False
        rest = 1 - self._newest() / STEPS
        late = max(0.0, (ending.moment - STARTING) / (1 - STARTING))
        lines = max(1, int(late * self._reference.lines * rest)) if ending.kind == "closed-pipe" else None
        command = Command(arguments(self._configuration, self._chain, self._directory, self._address), lines)
        early = min(1.0, ending.moment / STARTING)
        moment = early * self._reference.startup_seconds + late * rest * self._reference.training_seconds
        while command.process.poll() is None and not command.closed.wait(0.02):
            if lines is None and time.monotonic() - command.began >= moment:
                break
        if command.process.poll() is not None and not command.closed.is_set():
            return command, None
        when = "starting" if command.first_step is None else "leaving" if _over(command) else "training"
        return command, when if act(ending, command, self._where) else None

    def _newest(self) -> int:
        return max(saved_steps(open_store(self._address)), default=0)

    def _close(self, command: Command, kind: str, when: str) -> Outcome:
        """Wait for the end, restore what was taken away, check everything, and compare a run that is done."""
        wrong = []
        try:
            status = command.wait()
        except TimeoutError as error:
            status = -signal.SIGKILL
            wrong.append(str(error))
        left = command.left()
        wrong += [f"{LEFT_SECONDS} s after the end there was still {', '.join(left)}"] if left else []
        self._where.restore()
        seen = Seen(
            kind, status, list(command.lines), self._directory, self._address, self._chain.ranks, STEPS, KEEP, self._floor
        )
        outcome = Outcome(kind, self._chain.ranks, self._chain.engine, when, status, seen.reached)
        outcome.faults = [*wrong, *([] if wrong and status == -signal.SIGKILL else faults(seen))]
        outcome.screen = seen.lines
        self._floor = max([self._floor, *seen.claimed])
        if seen.reached is not None:
            for earlier in self._open:
                earlier.resumed = seen.resumed
            self._open = []
        self._open.append(outcome)
        if self._newest() == STEPS and status == 0:
            outcome.faults += differences(self._reference.directory, self._directory, self._address)
            self.compared += 1
            self._number, self._floor, self._open, self._fresh = self._number + 1, 0, [], True
        self.outcomes.append(outcome)
        self._tell(_line(outcome))
        return outcome


def _over(command: Command) -> bool:
    return any(line.startswith(("done: ", "stopped by ", f"step {STEPS}/")) for line in list(command.lines))


def _line(outcome: Outcome) -> str:
    words = f"{outcome.kind or 'let finish'}, {outcome.ranks} ranks, {outcome.engine}, {outcome.when}"
    ended = f"status {outcome.status}, last step {outcome.reached}"
    return "\n    ".join([f"{words}: {ended}", *outcome.faults])


def act(ending: Ending, command: Command, where: Place) -> bool:
    """End it. Whether it was still there to be ended."""
    match ending.kind:
        case "sigint" | "sigterm" | "sighup" | "sigusr1":
            command.process.send_signal(signal.Signals[ending.kind.upper()])
        case "double-sigint":
            command.process.send_signal(signal.SIGINT)
            time.sleep(0.02 + ending.detail**2)  # more often soon
            command.process.send_signal(signal.SIGINT)
        case "closed-pipe":
            pass  # its reader has gone
        case "kill-command":
            command.process.kill()
        case "kill-rank":
            return _kill_rank(ending, command)
        case "kill-all":
            for process in command.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        case "full-disk" | "store-gone":
            where.spoil(ending.kind)
            if ending.detail < 1 / 3:  # for a while only
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.process.wait(9 * ending.detail)
                where.restore()
        case _:
            raise ValueError(f"kind '{ending.kind}'; legal: {', '.join(KINDS)}")
    return True


def _kill_rank(ending: Ending, command: Command) -> bool:
    while command.process.poll() is None:
        ranks = command.ranks()
        if ranks:
            with contextlib.suppress(psutil.Error):
                ranks[int(ending.detail * len(ranks))].kill()
                return True
        time.sleep(0.05)  # it has none yet
    return False


def differences(whole: Path, directory: Path, address: str) -> list[str]:
    """How a run that was ended and resumed differs from the unbroken one, in sentences; none = in no bit."""
    found = []
    ours, theirs = records(directory), records(whole)
    if ours != theirs:
        found.append(f"metrics.jsonl: {_first_difference(ours, theirs)}")
    shown, written = board(directory / "tensorboard"), curves(whole)
    for tag in sorted(shown.keys() | written.keys()):
        if shown.get(tag) != written.get(tag):
            found.append(f"TensorBoard, {tag}: {_first_difference(shown.get(tag, []), written.get(tag, []))}")
    one, other = find_checkpoint(address), find_checkpoint(whole)
    if tensor_names(one) != tensor_names(other) or one.partition("?")[0].rpartition("/")[2] != other.rpartition("/")[2]:
        found.append(f"the last checkpoint: {one} holds other tensors than {other}")
    else:
        found += [f"{name} differs" for name in tensor_names(one) if not read_tensor(one, name).equal(read_tensor(other, name))]
    return found


def _first_difference(ours: list[tuple], theirs: list[tuple]) -> str:
    missing = [entry for entry in theirs if entry not in ours]
    more = [entry for entry in ours if entry not in theirs]
    words = [f"{len(missing)} are missing, the first {missing[0]}"] if missing else []
    words += [f"{len(more)} are not in the unbroken run, the first {more[0]}"] if more else []
    return "; ".join(words) or f"another order, or some more than once ({len(ours)} entries instead of {len(theirs)})"


_KEYS = (
    "kind", "step", "tokens", "loss", "grad_norm", "learning_rate", "skipped", "name", "context", "standard_error", "text",
)  # fmt: skip
_CURVES = ("loss", "grad_norm", "learning_rate", "standard_error")


def records(directory: Path) -> list[tuple]:
    """Everything in metrics.jsonl that is not of the clock or the machine, with every digit."""
    found = read_records(directory / FILE_NAME)
    return [tuple(record.get(key) for key in _KEYS) for record in found if record["kind"] in ("train", "evaluate", "text")]


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard is to show of metrics.jsonl: tag -> (step, value in single precision)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(directory / FILE_NAME):
        where = [record["kind"], *(str(record[key]) for key in ("name", "context") if key in record)]
        for key in _CURVES:
            if key in record and record["kind"] in ("train", "evaluate"):
                tag = "/".join([*where, key])
                found.setdefault(tag, []).append((record["step"], float(numpy.float32(record[key]))))
    return found


def board(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard does show of it."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it tells of every resume
    events = EventAccumulator(str(directory), size_guidance={SCALARS: 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.rpartition("/")[2] in _CURVES]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
