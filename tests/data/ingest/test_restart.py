"""A preparation killed twenty times ends in the bytes of an undisturbed one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from data.ingest.prepare import PrepareOptions, prepare

PROGRAM = """
import json, sys
from data.ingest.prepare import PrepareOptions, prepare
if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    prepare(**arguments | {"options": PrepareOptions(**arguments["options"])})
"""


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def start(program, arguments):
    root = str(Path(__file__).parents[3])
    return subprocess.Popen([sys.executable, program, json.dumps(arguments)], cwd=root, env={"PYTHONPATH": root})


def test_twenty_kills_change_no_byte(tmp_path, documents, tokenizer_directory):
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(4) for text in documents)
    )
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = {
        "inputs": [str(tmp_path / "x.jsonl")], "tokenizer_directory": tokenizer_directory,
        "task_bytes": 2500, "options": {"validation_fraction": 0.1, "deduplicate": True},
    }  # fmt: skip
    options = PrepareOptions(**arguments["options"])
    prepare(**arguments | {"options": options}, output=str(tmp_path / "calm"))
    draw, records = random.Random(0), tmp_path / "killed" / "tasks"
    for kill in range(20):
        before = len(list(records.glob("*.json")))
        arguments["workers"] = 2 if kill % 5 == 4 else 1
        process = start(program, {**arguments, "output": str(tmp_path / "killed")})
        wanted = before + draw.randint(0, 4)
        while len(list(records.glob("*.json"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        assert process.poll() is None, "it was killed at work, not after it"
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 20 < len(finished) < len(list((tmp_path / "calm" / "tasks").glob("*.json")))
    prepare(**arguments | {"workers": 1, "options": options}, output=str(tmp_path / "killed"))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished tasks were not done again"
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
