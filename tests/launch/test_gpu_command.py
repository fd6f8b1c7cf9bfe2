"""`python -m benchmarks.gpu`: what it measures is kept whatever happens to it."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import ceilings, page, smoke
from benchmarks.gpu.command import PLAN
from benchmarks.gpu.figures import Part, append, read
from data.storage import open_store
from trainer.checkpoint.api import Checkpoints
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.checkpoint.rectangles import Shard
from trainer.config import CheckpointConfig

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def started(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--output", str(folder), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def below(command: "subprocess.Popen[str]", *words: str) -> list[psutil.Process]:
    """What a command has started and what that has, with these words in its command line."""
    found = []
    for one in psutil.Process(command.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found += [one] if all(word in " ".join(one.cmdline()) for word in words) else []
    return found


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def figures(folder: Path) -> list[dict[str, Any]]:
    path = folder / "gpu.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_part_that_is_killed_leaves_its_figures_and_the_others_theirs(tmp_path: Path):
    command = started(tmp_path, "--only", "machine", "ceilings", "--seconds", "100")
    until(lambda: any(record["what"] == "copy" for record in figures(tmp_path)))
    below(command, "--part ceilings")[-1].send_signal(signal.SIGKILL)  # the first is its supervisor
    screen, _ = command.communicate(timeout=60)
    assert command.returncode == 1 and "ceilings: killed by signal 9" in screen
    found = {record["what"]: record for record in figures(tmp_path) if record["part"] == "ceilings"}
    assert found["copy"]["tb_per_second"] > 0 and found["end"]["error"] == "killed by signal 9"
    text = (tmp_path / "gpu.md").read_text()
    assert "tb per second" in text and "killed by signal 9" in text and "CPU cores" in text
    assert "--only machine ceilings" in text


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_signal_takes_everything_along_and_keeps_what_is_known(tmp_path: Path, number: int, status: int):
    """What a part has started too: here a process that imports."""
    command = started(tmp_path, "--only", "machine")
    until(lambda: below(command, "import launch.train"))
    found = below(command)
    assert len(found) == 3 and "machine" in {record["what"] for record in figures(tmp_path)}
    command.send_signal(number)
    _, words = command.communicate(timeout=30)
    assert command.returncode == status
    until(lambda: not [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])
    if number != signal.SIGKILL:
        assert words.startswith("tiglon: interrupted; figures: ") and words.count("\n") == 1
        assert [record["error"] for record in figures(tmp_path) if "error" in record] == ["interrupted"]
        assert "CPU cores" in (tmp_path / "gpu.md").read_text()


def test_an_early_interrupt_is_one_sentence_too(tmp_path: Path):
    command = started(tmp_path / "out")
    until(lambda: "libtorch" in Path(f"/proc/{command.pid}/maps").read_text())  # it imports torch
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=30) == ("", "tiglon: interrupted\n") and command.returncode == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed", [True, False])
def test_nothing_outlives_a_supervisor_that_is_let_go(tmp_path: Path, killed: bool):
    """Nor its command: sessions of their own, and processes whose parents are gone, are below it all the same."""
    lone = "import os, subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {lone!r}]); print('begun', flush=True); "
    code += "time.sleep(1000)" if killed else "sys.exit(3)"
    command = [sys.executable, "-m", "benchmarks.gpu.supervisor", sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdin=pipe, stdout=pipe, start_new_session=True) as supervisor:
        assert supervisor.stdout is not None and supervisor.stdin is not None
        assert supervisor.stdout.readline() == b"begun\n"
        found = psutil.Process(supervisor.pid).children(recursive=True)
        assert "sleep" in [one.name() for one in found] or not killed
        if killed:
            supervisor.stdin.close()
        assert supervisor.wait(10) == (137 if killed else 3)
        ended = select.select([supervisor.stdout], [], [], 5)[0]
        assert ended and supervisor.stdout.read() == b""  # its end: nobody has it open any more
    assert not [one for one in found if one.is_running()]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--seconds", "nan"], "--seconds nan"), (["--seconds", "0"], "--seconds 0"), (["--seconds", "-5"], "--seconds -5"),
        (["--only", "smoke", "--skip", "smoke"], "no part"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, arguments: list[str], word: str):
    command = started(tmp_path / "out", *arguments)
    _, words = command.communicate(timeout=60)
    assert command.returncode == 2 and words.count("\n") == 1 and word in words
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_not_begun_and_said(tmp_path: Path):
    command = started(tmp_path, "--only", "step-8b", "--seconds", "10")
    screen, _ = command.communicate(timeout=60)
    assert command.returncode == 1 and "step-8b: not begun, 10 s left" in screen


def test_three_calls_are_enough_whatever_the_parts_take():
    """As docs/speed.md divides them; what runs beside another takes no time of its own."""
    text = (ROOT / "docs/speed.md").read_text()
    limits = {plan.name: 0.0 if plan.beside else plan.limit_seconds for plan in PLAN}
    names = list(limits)
    calls = [names[: names.index("attention") + 1], *(found.split() for found in re.findall("`--only ([^`]*)`", text))]
    assert len(calls) == 3 and {name for call in calls for name in call} == set(names)
    assert max(sum(limits[name] for name in call) for call in calls) <= 580
    assert all(plan.limit_seconds <= limits["smoke"] for plan in PLAN if plan.beside)


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "torch finds no GPU here" in done.stderr


def test_a_ratio_is_taken_within_one_call():
    step = {"part": "step-8b", "what": "step", "shape": "8b", "length": 4096, "micro_batches": 1, "at": 0.0}
    peer = {"part": "peers-8b", "what": "peer", "name": "other", "shape": "8b", "length": 4096, "at": 0.0}
    records = [
        {"run": "a", **step, "tokens_per_second": 300.0}, {"run": "b", **step, "tokens_per_second": 200.0},
        {"run": "b", **peer, "tokens_per_second": 100.0},
    ]  # fmt: skip
    assert "| 2.00 |" in "\n".join(page.lines(records))
    assert "| not in this call |" in "\n".join(page.lines([records[0], records[2]]))


def ran(run: str, *figures: float, **end: str) -> list[dict[str, Any]]:
    begun = {} if "not begun" in end.get("error", "") else {"seconds": 9.0}
    own = [{"what": "stall", "stall_seconds": each} for each in figures] + [{"what": "end", **begun, **end}]
    return [{"run": run, "part": "stall", "at": 0.0, **record} for record in own]


def test_a_later_call_that_broke_off_does_not_hide_a_whole_table():
    whole, broken, not_begun = ran("a", 11.0, 12.0), ran("b", 13.0, error="out of time"), ran("c", error="not begun: 3 s left")
    text = "\n".join(page.lines(whole + broken + not_begun))
    assert "| 11 |\n| 12 |" in text and "| 13 |" not in text
    assert "- The call of b broke off (out of time); its figures in gpu.jsonl: 1" in text and "call of c" not in text
    text = "\n".join(page.lines(whole + broken[:1]))  # a SIGKILL of the command
    assert "| 12 |" in text and "- The call of b broke off (killed with the command); its figures in gpu.jsonl: 1" in text
    text = "\n".join(page.lines(whole + broken + ran("d", 14.0)))
    assert "| 14 |" in text and "| 12 |" not in text and "call of" not in text


def test_a_later_call_that_failed_is_told_with_its_faults_where_it_has_no_figure():
    failed = [{"run": "b", "part": "stall", "what": "failed test", "error": "FAILED tests/test_gpu.py::test_it"}]
    text = "\n".join(page.lines(ran("a", 11.0) + failed + ran("b", error="out of time")))
    assert "- The call of b broke off (out of time); its figures in gpu.jsonl: 0\n  - failed test: FAILED tests/t" in text


def test_a_page_is_of_one_kind_of_card():
    calls = [
        [{"run": run, "part": "run", "what": "begin", "command": f"call {run}", "device": "cuda", "card": card, "tiny": False}]
        + ran(run, stall)
        for run, card, stall in (("a", "H100", 11.0), ("b", "H200", 12.0))
    ]
    text = "\n".join(page.lines(calls[0] + calls[1]))
    assert text.startswith("# On one GPU\n\n    call b    # b\n\nH200; ") and "| 11 |" not in text and "Call of b, 9 s." in text


def test_a_line_that_was_torn_off_costs_nothing_but_itself(tmp_path: Path):
    append(tmp_path, record := {"run": "a", "part": "stall", "what": "end"})
    with (tmp_path / "gpu.jsonl").open("ab") as file:
        file.write(b'12\n{"run": "a", "part": "st\xc3')
    append(tmp_path, record)
    assert read(tmp_path) == [record, record]


def leave(directory: Path, weight: float, last_loss: float) -> None:
    """What a run of four steps leaves: its records and its last checkpoint."""
    shutil.rmtree(directory, ignore_errors=True)
    settings = CheckpointConfig(asynchronous=False, resume="never")
    kept = Checkpoints(open_store, str(directory / "checkpoints"), settings, None, print)
    kept.save([Shard("weight/w", (2,), (2,), (0,), 0, torch.tensor([1.0, weight]))], CheckpointMeta(4, 0))
    kept.close()
    records = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 6.0), (4, last_loss))]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_way_that_resumes_to_other_bits_or_does_not_learn_has_failed(tmp_path: Path):
    runs = {("fold", kind): tmp_path / kind for kind in ("halves", "whole")}
    ended, resumed = dict.fromkeys(runs, (0, "", 1.0)), {("fold", "halves"): (0, "resumed from step 2", 1.0)}

    def found(weight: float = 1.0, last_loss: float = 5.0) -> dict[str, Any]:
        leave(tmp_path / "halves", weight, last_loss)
        leave(tmp_path / "whole", 1.0, last_loss)
        return smoke.judged("fold", runs, ended, resumed, 4)

    assert "error" not in found()
    assert "other bits" in found(weight=2.0)["error"]
    assert found(last_loss=7.0)["error"] == "the loss went from 6.0000 to 7.0000"
    with pytest.raises(RuntimeError, match="a run without a word, status -9"):
        smoke.judged("fold", runs, {**ended, ("fold", "whole"): (-9, "", 1.0)}, resumed, 4)


@pytest.mark.slow
def test_a_second_call_into_the_same_folder_is_refused(tmp_path: Path):
    first = started(tmp_path, "--only", "machine")
    until(lambda: below(first, "--part machine"))
    second = started(tmp_path, "--only", "machine")
    _, words = second.communicate(timeout=60)
    assert second.returncode == 2 and words.startswith("tiglon: another call writes to") and words.count("\n") == 1
    first.communicate(timeout=60)
    assert first.returncode == 0 and len({record["run"] for record in figures(tmp_path)}) == 1


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("precious")
    command = started(tmp_path / "out", "--only", "machine")
    _, words = command.communicate(timeout=60)
    assert command.returncode == 2 and words.endswith("out is a file; give a folder\n")
    assert (tmp_path / "out").read_text() == "precious"


def test_where_no_call_came_to_its_end_the_newest_figures_are_shown():
    text = "\n".join(page.lines(ran("a", 11.0, error="x") + ran("b", 12.0, error="out of time") + ran("c", error="not begun")))
    assert "| 12 |" in text and "| 11 |" not in text and "- end: out of time" in text and "call of" not in text


def test_a_backend_that_does_not_serve_has_torchs_reason(tmp_path: Path):
    part = Part("ceilings", "a", tmp_path, tmp_path, torch.device("cpu"), tiny=True)
    found = ceilings.attention(part, SDPBackend.FLASH_ATTENTION, 1, 16, 4, 4, 32, 16)
    assert found["not_served"].startswith("Flash attention requires q,k,v to have the same last dimension")
    assert found["not_served"].endswith("Value.size(-1): 16 instead.")


def test_the_reason_is_the_first_warning_about_the_backend_itself():
    """As a GPU's torch says them, all backends one after the other (sdp_utils.cpp)."""
    words = [
        "Memory efficient kernel not used because: (Triggered internally at a.cpp:1.)", "it was disabled (Triggered ...)",
        "Flash attention kernel not used because: (Triggered internally at a.cpp:2.)", "flash was disabled",
        "cuDNN attention kernel not used because: (Triggered internally at a.cpp:3.)",
        "heads of 192\n  are too wide (Triggered internally at a.cpp:4.)", "another check",
    ]  # fmt: skip
    assert ceilings.reason(SDPBackend.CUDNN_ATTENTION, words) == "heads of 192"
    assert ceilings.reason(SDPBackend.FLASH_ATTENTION, words) == "flash was disabled"
    assert ceilings.reason(SDPBackend.FLASH_ATTENTION, words[:3]) == "torch does not say why"


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_every_part_runs_on_a_cpu(tmp_path: Path):
    command = started(tmp_path, "--seconds", "1000")
    screen, words = command.communicate(timeout=1050)
    assert command.returncode == 0, screen + words
    measured = {record["part"] for record in figures(tmp_path) if record["what"] not in ("begin", "end")}
    assert measured == {plan.name for plan in PLAN}
    assert "not in this call" not in (tmp_path / "gpu.md").read_text()  # every ratio has found what it is held against
