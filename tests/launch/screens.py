"""What the screen of a training command said, and whether it was true. (No test itself.)"""

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

from data.storage import is_remote, join_address, open_store
from launch.checkpoints import verify_checkpoint
from trainer.checkpoint.directory import directory_name, saved_steps

STOPPED = "stopped"
"""The file in the run's directory that says that it was stopped and is to be resumed."""
_STEP = re.compile(r"step +(\d+)/\d+  loss")
_SAVED = re.compile(r"saved in (\S*step-(\d{8,})[^\s;,]*)")
_COMPLETE = re.compile(r"checkpoint of step (\d+) complete")
_KEPT = re.compile(r"(?:newest complete checkpoint is|resumes from) (\S*step-(\d{8,})[^\s;,]*)")
_RESUMED = re.compile(r"resumed from (\S*): step (\d+)")
_SENTENCE = re.compile(r"tiglon(, rank \d+)?: \S")
_SIGNALS = {"sigint": "SIGINT", "sigterm": "SIGTERM", "sighup": "SIGHUP", "sigusr1": "SIGUSR1", "double-sigint": "SIGINT"}
_NO_ROOM = re.compile(r"is not saved: |in a row could not be written|No space left|make room|cannot be (written|made)")
_NO_STORE = re.compile(
    r"is not saved: |in a row could not be written|cannot be (written|read|opened)|does not answer|AWS Error"
)


@dataclass(frozen=True)
class Seen:
    """A command that has ended."""

    kind: str
    """How it was ended, or "" for one that was left alone."""
    status: int
    lines: list[str]
    directory: Path
    """Of the run."""
    address: str
    """Of its checkpoints."""
    ranks: int
    steps: int
    """Of the whole run."""
    keep: int
    """Newest checkpoints that stay."""
    floor: int
    """Newest step that earlier screens had said to be saved."""

    resumed: int | None = field(init=False)
    """The step it says that it resumed from."""
    reached: int | None = field(init=False)
    """The last step on the screen."""
    claimed: set[int] = field(init=False)
    """Steps of checkpoints that it says are there."""

    def __post_init__(self) -> None:
        found = self._found(_RESUMED)
        object.__setattr__(self, "resumed", int(found[-1][1]) if found else None)
        reached = self._found(_STEP)
        object.__setattr__(self, "reached", int(reached[-1]) if reached else None)
        claimed = {int(step) for _, step in [*self._found(_SAVED), *self._found(_KEPT), *found]}
        object.__setattr__(self, "claimed", claimed | {int(step) for step in self._found(_COMPLETE)})

    def _found(self, pattern: re.Pattern) -> list:
        return [found for line in self.lines for found in pattern.findall(line)]

    def has(self, pattern: str) -> bool:
        """Whether a line has it."""
        return any(re.search(pattern, line) for line in self.lines)

    @property
    def over(self) -> bool:
        """Whether the run had said its last word, so that only leaving was left."""
        return self.has(r"^done: |^stopped by ")


def faults(seen: Seen) -> list[str]:
    """Everything that is wrong with how the command ended, a sentence each."""
    found = [_status(seen), _sentence(seen), *_checkpoints(seen), _resume(seen), _file(seen)]
    if seen.kind != "closed-pipe" and seen.has("^Traceback") and not _python_alone(seen):
        found.append("a traceback is on the screen")
    return [text for text in found if text]


def _python_alone(seen: Seen) -> bool:
    """Whether Ctrl-C met Python before it had come to this project's code."""
    return seen.kind in ("sigint", "double-sigint") and not seen.has(r'File ".*/(launch|trainer|model|data)/')


def _status(seen: Seen) -> str:
    """Whether the exit status is that of the way it ended, and the words are those of the status."""
    match seen.kind:
        case _ if seen.status == 0:
            last = seen.lines[-1] if seen.lines else ""
            done = re.match(rf"done: (all {seen.steps} steps; saved in \S*{directory_name(seen.steps)}|.* has all )", last)
            return "" if done or seen.kind == "closed-pipe" else f"status 0, but the last line is '{last}'"
        case "sigint" | "sigterm" | "sighup" | "sigusr1" | "double-sigint":
            return _signalled(seen, _SIGNALS[seen.kind])
        case "kill-command" | "kill-all":
            return "" if seen.status == -signal.SIGKILL else f"status {seen.status} after SIGKILL"
        case "kill-rank":
            if seen.status == 137 and seen.has(r"^tiglon: rank \d+ was killed \(SIGKILL\)"):
                return ""
            return f"status {seen.status}, wanted 137 and a line that names the rank killed"
        case "full-disk" | "store-gone":
            words = _NO_ROOM if seen.kind == "full-disk" else _NO_STORE
            told = any(_SENTENCE.match(line) and words.search(line) for line in seen.lines)
            return "" if seen.status in (1, 2) and told else f"status {seen.status}, wanted 1 or 2 and a sentence that says why"
        case _:
            return f"status {seen.status}, wanted 0"


def _signalled(seen: Seen, name: str) -> str:
    if seen.status == 85:
        stopped = seen.has(rf"^stopped by {name} at step \d+; saved in \S*step-\d+\S*; the same command resumes")
        return "" if stopped else f"status 85 without 'stopped by {name} at step N; saved in PATH; the same command resumes'"
    if seen.status == 130 and seen.has(r"^tiglon: (left at once by a second SIGINT|interrupted|ended by SIGINT before)"):
        early = seen.kind == "sigint" and seen.reached is not None
        return "status 130 of one SIGINT in the middle of training" if early else ""
    return "" if _by_default(seen) else f"status {seen.status} after {name}, wanted 85 and 'stopped by {name} ...'"


def _by_default(seen: Seen) -> bool:
    """Whether the signal found no handler of ours: before there was one, or after the last word."""
    if seen.kind not in _SIGNALS:
        return False
    number = signal.Signals[_SIGNALS[seen.kind]]
    if seen.status not in (-number, 128 + number):
        return False
    early = seen.reached is None and (number != signal.SIGINT or (seen.status < 0 and _python_alone(seen)))
    return early or seen.over


def _sentence(seen: Seen) -> str:
    """A command that fails says why."""
    silent = seen.kind in ("closed-pipe", "kill-command", "kill-all") or seen.status in (0, 85) or _by_default(seen)
    told = any(_SENTENCE.match(line) for line in seen.lines)
    return "" if silent or told else f"status {seen.status} without a sentence"


def _checkpoints(seen: Seen) -> list[str]:
    """Every visible checkpoint is whole, and every one that was said to be there is, unless newer ones have replaced it."""
    visible = saved_steps(open_store(seen.address)) if is_remote(seen.address) or Path(seen.address).is_dir() else []
    found = []
    for step in visible:
        try:
            verify_checkpoint(join_address(seen.address, directory_name(step)))
        except (ValueError, OSError) as error:
            found.append(f"checkpoint of step {step}: {error}")
    for step in sorted(seen.claimed - set(visible)):
        if len([newer for newer in visible if newer > step]) < seen.keep:
            found.append(f"the checkpoint of step {step} was said to be there, and there are only {visible}")
    for path, step in [*seen._found(_SAVED), *seen._found(_KEPT)]:
        wanted = join_address(seen.address, directory_name(int(step)))
        if not is_remote(seen.address) and Path(path) != Path(wanted):
            found.append(f"it names {path}, wanted {wanted}")
    return found


def _resume(seen: Seen) -> str:
    """It resumed from what was promised, or from later."""
    began = min((int(step) for step in seen._found(_STEP)), default=None)
    if seen.kind == "closed-pipe":
        return ""
    if seen.resumed is not None and seen.resumed < seen.floor:
        return f"resumed from step {seen.resumed}, but {seen.floor} was said to be saved"
    if seen.resumed is None and began is not None and seen.floor > 0:
        return f"began anew, but step {seen.floor} was said to be saved"
    if seen.resumed is not None and began is not None and began != seen.resumed + 1:
        return f"resumed from step {seen.resumed} and continued with step {began}"
    return ""


def _file(seen: Seen) -> str:
    """RUN/stopped is there exactly after a stop."""
    there = (seen.directory / STOPPED).exists()
    if seen.status == 85 and not there:
        return f"status 85, but there is no {STOPPED} in the run's directory"
    if there and (seen.status == 0 or (seen.reached is not None and seen.status != 85 and not _by_default(seen))):
        return f"status {seen.status}, but {STOPPED} lies in the run's directory"
    return ""
