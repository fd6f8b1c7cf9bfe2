"""The commands of README and docs as they stand there, from a wheel in an environment of its own outside any checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
FEW = "train.steps=4"
"""What is added to commands that would train for minutes."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the programs of an environment that has tiglon from a wheel, and its dependencies from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(sources),
    ]
    subprocess.run(build, check=True, timeout=200)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True, timeout=100)
    own = Path(subprocess.run([folder / "env/bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                              capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
    # a path in a .pth file is searched, but the .pth files there, one of which leads to this checkout, are not read
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", folder / "env/bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, *folder.glob("*.whl")], check=True, timeout=200)
    return folder / "env/bin"


def commands(page: str, after: str) -> list[str]:
    """The commands in the first indented block behind these words of a page, continued lines joined, comments gone."""
    block = re.search(r"^    .*\n(?:^    .*\n|^\n)*", (ROOT / page).read_text().partition(after)[2], flags=re.MULTILINE)
    assert block, f"{page} has no block after '{after}'"
    lines = block[0].replace("\\\n", " ").splitlines()
    plain = [re.sub(r"\s+# .*", "", line).strip().removeprefix("$ ") for line in lines]
    found = [line for line in plain if line.startswith(("tiglon ", "python "))]
    assert found, f"{page} has no command after '{after}'"
    return found


class Shell:
    """Commands in one directory, as typed there."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder = folder
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment = {**kept, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(self, command: str, status: int = 0) -> str:
        """Run a command; what it showed."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def shell(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A directory with `books/`: a part of Python's standard library."""
    shell = Shell(installed, tmp_path_factory.mktemp("newcomer"))
    shell.run("python -m launch.standard_library books/library.parquet")
    library = pq.read_table(shell.folder / "books/library.parquet")
    pq.write_table(library.slice(0, library.num_rows // 3), shell.folder / "books/library.parquet")
    return shell


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_your_own_text(shell: Shell):
    """README: from text to a model of Hugging Face; then again, which resumes, and whatever else it says of my.toml."""
    where = shell.run("python -c 'import launch, data, model; print(launch.__file__, data.__file__, model.__file__)'")
    assert where.count("site-packages") == 3 and str(ROOT) not in where
    block = commands("README.md", "## Your own text")
    assert [command.split()[1] for command in block] == [
        "tokenizer", "prepare", "init", "train", "evaluate", "generate", "report", "export"
    ]  # fmt: skip
    for command in block[:3]:
        shell.run(command)
    assert "done: runs/my has all 4 steps" in shell.run(f"{block[3]} {FEW}")
    again = shell.run(f"{block[3]} train.steps=6")
    assert "resumed from runs/my/checkpoints/step-00000004" in again and "done: runs/my has all 6 steps" in again
    for command in block[4:]:
        shell.run(command)
    assert json.loads((shell.folder / "my/model/config.json").read_text())["vocab_size"] == 8000
    assert (shell.folder / "runs/my/report/report.html").stat().st_size > 10_000
    changed = block[3].partition("my.toml")[2]
    assert "tokens per update" in shell.run(commands("README.md", "## One GPU")[0])
    shell.run(commands("README.md", "## One GPU")[1] + changed)
    slurm = next(command for command in commands("README.md", "## Several GPUs") if command.startswith("tiglon slurm"))
    assert "sbatch my.sbatch" in shell.run(f"{slurm} --nodes 1 --gpus-per-node 2 {changed}")
    _checkpoints_and_models(shell)


def _checkpoints_and_models(shell: Shell) -> None:
    """docs/checkpoints.md and docs/families.md, with the run made above for RUN, A and B, its export for DIR."""
    names = {
        "RUN": "runs/my",
        "A": "runs/my/checkpoints/step-00000004",
        "B": "runs/my",
        "DIR": "my/model",
        "CHECKPOINT": "imported",
    }
    block = [re.split(r" {3,}", command)[0].replace("[--numbers]", "--numbers")
             for command in commands("docs/checkpoints.md", "## Inspecting")]  # fmt: skip
    block += commands("docs/families.md", "without another word")
    for command in block:
        command = re.sub(r"\b(RUN|A|B|DIR|CHECKPOINT)\b", lambda name: names[name[0]], command)
        shell.run(
            command + (f" {FEW} train.global_batch_size=8" if " train " in command else ""),
            status=1 if " diff " in command else 0,
        )
    assert (shell.folder / "my-model/config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart(shell: Shell):
    """`make pretrain`'s command, with few steps, and what README and docs/attention.md do with its run."""
    assert "report.html" in shell.run("tiglon quickstart --steps 4")
    for command in commands("README.md", "that you can repeat any of them")[4:]:
        shell.run(command)
    for command in commands("docs/attention.md", "The maps of training and of evaluation"):
        shell.run(command)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_data(shell: Shell):
    shell.run("rm -rf tokenizer corpus")
    for command in commands("docs/data.md", "these commands use it"):
        shown = shell.run(command)
    assert "every shard has the size, checksum, boundaries and tokens its manifest states" in shown
