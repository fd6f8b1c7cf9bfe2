"""The packages `data`, `model` and `trainer` are ours, whatever lies in the working directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_train import ENVIRONMENT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.py", "model.py", "trainer.py", "data", "model/parallel/layers.py"])
def test_a_stray_file_in_the_working_directory_breaks_no_run(configuration: str, tmp_path: Path, name: str):
    stray = tmp_path / "here" / name
    stray.parent.mkdir(parents=True)
    stray.write_text("raise SystemExit('somebody else')\n") if stray.suffix else stray.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "launch.train"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    for start in (torchrun, [sys.executable, "-m", "launch", "train"]):
        command = [*start, configuration, "train.steps=1", f"run.dir={tmp_path}/{len(start)}"]
        done = subprocess.run(command, env=environment, cwd=tmp_path / "here", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_a_file_of_that_name_that_was_imported_before_is_named(tmp_path: Path):
    (tmp_path / "data.py").touch()
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import data, launch"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert f"ImportError: tiglon needs its package 'data', but {tmp_path}/data.py was imported before; rename it" in done.stderr
