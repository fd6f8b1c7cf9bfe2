"""The sbatch script: what stands in it, what is refused before it queues, and that a shell can read it."""

import os
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from launch.commands import slurm
from launch.commands.slurm import Job, sbatch_script, slurm_command, time_limit_seconds
from launch.load_config import build_config

ROOT = Path(__file__).parent.parent.parent.parent
JOB = Job(nodes=4, gpus_per_node=8, ranks_per_node=8, time="2-00:00:00")


def made(*overrides: str, **changes: object) -> str:
    values = {"run": {"dir": "runs/big one"}, "train": {"global_batch_size": 64, "micro_batch_size": 2}}
    return sbatch_script(
        build_config(values, overrides),
        "big.toml",
        ["train.steps=5", "run.dir=runs/big one"],
        Job(**{**JOB.__dict__, **changes}),
    )


def test_the_script_says_what_a_person_would_have_written():
    text = made(
        partition="fast", account="us", cpus_per_task=96, mem="200G", exclusive=True, qos="high", constraint="h100&nvlink",
        options=("--reservation=maintenance", "--no-kill"), before=("module load cuda",),
    )  # fmt: skip
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=96",
        "#SBATCH --partition=fast", "#SBATCH --account=us", "#SBATCH --time=2-00:00:00", "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue", "#SBATCH --output=\"runs/big one/logs/slurm-%j.log\"", "module load cuda",
        "#SBATCH --mem=200G", "#SBATCH --exclusive", "#SBATCH --qos=high", '#SBATCH --constraint="h100&nvlink"',
        "#SBATCH --reservation=maintenance", "#SBATCH --no-kill",
    ):  # fmt: skip
        assert line in text
    assert "--nnodes=4 --nproc-per-node=8 --max-restarts=3" in text
    assert "-m launch.train big.toml train.steps=5 'run.dir=runs/big one'" in text
    assert len(made().splitlines()) < 55


def test_memory_is_the_site_s_default_or_all_of_a_node_that_is_not_shared():
    assert "--mem" not in made() and "--exclusive" not in made()
    assert "#SBATCH --mem=0\n#SBATCH --exclusive\n" in made(exclusive=True)
    assert "#SBATCH --mem=64g\n#SBATCH --exclusive\n" in made(exclusive=True, mem="64g")


@pytest.mark.parametrize(
    ("environment", "threads", "of_step"),
    [
        ({"SLURM_CPUS_ON_NODE": "2"}, "1", ""),
        ({"SLURM_CPUS_ON_NODE": "100"}, "12", ""),
        ({"SLURM_CPUS_ON_NODE": "100", "SLURM_CPUS_PER_TASK": "64"}, "8", "64"),
        ({}, "1", ""),
    ],
)
def test_the_ranks_of_a_node_share_its_cores(environment: dict[str, str], threads: str, of_step: str):
    """What srun is told, and the threads of one of eight ranks."""
    lines = [line for line in made().splitlines() if line.startswith(("cpus=", "[ -z", "export OMP_NUM_THREADS"))]
    script = "\n".join([*lines, 'echo "$OMP_NUM_THREADS,$SRUN_CPUS_PER_TASK"'])
    assert subprocess.check_output(["/bin/bash", "-c", script], env=environment, text=True) == f"{threads},{of_step}\n"


def test_bash_can_read_it():
    assert subprocess.run(["bash", "-n"], input=made(), text=True, capture_output=True, check=False).stderr == ""


def test_cpu_jobs_ask_for_no_gpus():
    text = made("run.device=cpu", gpus_per_node=0, ranks_per_node=2)
    assert "--gpus" not in text
    assert "--nproc-per-node=2" in text


def test_notice_follows_the_grace_period():
    text = made("health.grace_seconds=120")
    assert "--signal=B:USR1@210" in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1 " in made("health.grace_seconds=0.2"), "0 would kill at once"


@pytest.mark.parametrize(
    ("overrides", "changes", "sentence"),
    [
        ((), {"nodes": 3}, r"train.global_batch_size = 64 is not a multiple of train.micro_batch_size = 2 times 24"),
        ((), {"nodes": 0}, r"--nodes must be at least 1, got 0"),
        ((), {"gpus_per_node": -8}, r"--gpus-per-node must be at least 0, got -8"),
        ((), {"cpus_per_task": -1}, r"--cpus-per-task must be at least 0, got -1"),
        ((), {"max_restarts": -1}, r"--max-restarts must be at least 0, got -1"),
        ((), {"time": "1-"}, r"--time 1- is not a time limit"),
        ((), {"time": "1:2:3:4"}, r"--time 1:2:3:4 is not a time limit"),
        ((), {"time": "00:00:10"}, r"--time 00:00:10 is 10 s, but 120 s before .* give at least 240 s, that is 4 minutes"),
        (("health.grace_seconds=600",), {"time": "10"}, r"is 600 s, but 690 s before .*health.grace_seconds = 600 and 90 s"),
        (("run.dir=runs\\\\x",), {}, r"run.dir = 'runs.*x': sbatch cannot read a name with a backslash"),
        ((), {"partition": "a\nb"}, r"--partition = 'a.nb': sbatch cannot read"),
        ((), {"mem": "12 gigs"}, r"--mem 12 gigs is not a size of memory; write megabytes, or a number with K, M, G or T"),
        ((), {"mem": "-1"}, r"--mem -1 is not a size of memory"),
        ((), {"qos": "a\\b"}, r"--qos = 'a.*b': sbatch cannot read a name with a backslash"),
        ((), {"constraint": "a\rb"}, r"--constraint = 'a.rb': sbatch cannot read"),
        ((), {"options": ("--comment=a\nb",)}, r"--option = '--comment=a.nb': sbatch cannot read"),
        ((), {"options": ("-C fast",)}, r"--option '-C fast' is not --NAME or --NAME=VALUE; write .*--reservation=maintenance"),
        (
            (),
            {
                "options": (
                    "--reservation",
                    "--mem=",
                )
            },
            r"--option '--mem=' is not --NAME or",
        ),
        ((), {"options": ("--nodes=2",)}, r"--option --nodes=2: --nodes is the script's own"),
        ((), {"options": ("--export=NONE",)}, r"--option --export=NONE: --export is the script's own"),
        ((), {"options": ("--outp=x",)}, r"--option --outp=x: --output is the script's own"),
        ((), {"time": "two days"}, r"--time two days is not a time limit; write minutes, HH:MM:SS or D-HH:MM:SS"),
        (("checkpoint.resume=never",), {}, r"checkpoint.resume = 'never' would start a requeued job from the beginning"),
        (("run.device=cuda",), {"gpus_per_node": 0}, r"run.device = 'cuda' needs GPUs, but --gpus-per-node is 0"),
        (("parallel.tensor_parallel_size=4",), {"ranks_per_node": 2}, r"tensor_parallel_size = 4 would cross nodes of 2 ranks"),
        (("parallel.tensor_parallel_size=2",), {"ranks_per_node": 1}, r"tensor_parallel_size = 2 would cross nodes of 1 rank,"),
        (("parallel.context_parallel_size=64",), {}, r"cannot form groups of .* parallel.context_parallel_size = 64; start a"),
    ],
)
def test_what_could_not_run_is_refused_before_it_queues(overrides, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(*overrides, **changes)


def sbatch_words(line: str) -> list[str]:
    """A line as sbatch takes it apart: get_argument in src/sbatch/opt.c of SLURM, in which a backslash protects the next
    character, also inside quotes."""
    words, word, quote, at = [], "", "", 0
    started = False
    while at < len(line):
        letter = line[at]
        if letter == "\\":
            at += 1
            word, started = word + line[at], True
        elif quote:
            quote, word = ("", word) if letter == quote else (quote, word + letter)
        elif letter in "\"'":
            quote, started = letter, True
        elif letter == "#":
            break
        elif letter.isspace():
            words, word, started = [*words, word] if started else words, "", False
        else:
            word, started = word + letter, True
        at += 1
    return [*words, word] if started else words


@pytest.mark.parametrize(
    "directory", ["runs/big one", "runs/a#1", "runs/\"so\" 'called'", "runs/100%", "runs/läufe; rm -rf $HOME `x`", "runs/plain"]
)
def test_sbatch_and_bash_read_the_same_place(directory: str, tmp_path: Path):
    config = build_config({"run": {"dir": directory}, "train": {"global_batch_size": 64, "micro_batch_size": 2}})
    changes = {"partition": "fast one", "account": "us", "qos": "a#b", "options": ("--comment=for 'us' # only",)}
    text = sbatch_script(config, "big.toml", [], Job(**{**JOB.__dict__, **changes}))
    options = [word for line in text.splitlines() if line.startswith("#SBATCH") for word in sbatch_words(line[7:])]
    log = next(word for word in options if word.startswith("--output=")).removeprefix("--output=")
    assert log.replace("%%", "%") == f"{directory}/logs/slurm-%j.log", "%j is the job's number, %% a percent sign"
    assert "--partition=fast one" in options and "--account=us" in options
    assert "--qos=a#b" in options and "--comment=for 'us' # only" in options
    assert all(word.startswith("--") for word in options) and len(options) == 13
    name = next(word for word in options if word.startswith("--job-name=")).removeprefix("--job-name=")
    assert name and set(name) <= set(string.ascii_letters + string.digits + "-")
    _, making, rest = text.partition("mkdir -p ")
    subprocess.run(["bash", "-c", making + rest.splitlines()[0]], cwd=tmp_path, check=True)
    assert (tmp_path / directory / "logs").is_dir()


@pytest.mark.parametrize(
    ("time", "wanted"),
    [
        ("30", 1800), ("30:20", 1820), ("100:00:00", 360000), ("1-12", 129600), ("1-12:30", 131400), ("1-12:30:15", 131415),
        ("0", None), ("0:00", None), ("00:00:00", None), ("0-0", None), ("UNLIMITED", None), ("infinite", None),
        ("00:04:00", 240),
    ],
)  # fmt: skip
def test_times_are_those_of_slurm(time: str, wanted: int | None):
    assert time_limit_seconds(time) == wanted
    assert f"#SBATCH --time={time}\n" in made(time=time)


SRUN = {
    "finishes": "exit 0",
    "fails": "exit 3",
    "is stopped and saves": 'touch "$RUN/stopped"; exit 1',
    "is stopped and leaves with 0": 'touch "$RUN/stopped"; exit 0',
    "does its last step when told to stop": "trap 'exit 0' USR1; ready",
    "saves when told to stop": "trap 'touch \"$RUN/stopped\"; exit 1' USR1; ready",
    "is killed before it has saved": "trap 'exit 137' USR1; ready",
}


@pytest.mark.parametrize(
    ("what", "status", "requeued"),
    [
        ("finishes", 0, False),
        ("fails", 3, False),
        ("is stopped and saves", 85, False),
        ("is stopped and leaves with 0", 85, False),
        ("does its last step when told to stop", 0, False),
        ("saves when told to stop", 85, True),
        ("is killed before it has saved", 137, True),
    ],
)
def test_how_the_script_ends(what: str, status: int, requeued: bool, tmp_path: Path):
    """The script under bash; srun and scontrol are programs of ours that do what the name says."""
    directory, programs = tmp_path / "a run", tmp_path / "programs"
    programs.mkdir()
    for name, body in (
        ("srun", f"ready() {{ touch '{tmp_path}/ready'; for _ in $(seq 600); do /bin/sleep 0.05; done; }}\n{SRUN[what]}"),
        ("scontrol", f"echo \"$@\" >>'{tmp_path}/scontrol'; [ $1 != show ] || echo node1"),
        ("sleep", "exit 0"),  # in the place of SLURM, which ends the script in that time
    ):
        (programs / name).write_text(f"#!/bin/bash\nexport RUN='{directory}'\n{body}\n")
        (programs / name).chmod(0o755)
    (directory / "logs").mkdir(parents=True)
    (directory / "stopped").touch()  # of an earlier start
    config = build_config({"run": {"dir": str(directory)}, "train": {"global_batch_size": 64, "micro_batch_size": 2}})
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]"}
    (tmp_path / "job").write_text(sbatch_script(config, "big.toml", [], JOB))
    process = subprocess.Popen(["bash", str(tmp_path / "job")], env=environment, stdout=subprocess.DEVNULL)
    if "ready" in SRUN[what]:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == status
    told = (tmp_path / "scontrol").read_text().splitlines()
    assert told == ["show hostnames node[1-2]", *(["requeue 77"] if requeued else [])]


def test_a_notice_after_the_end_begins_nothing_again(tmp_path: Path):
    """The signal and the failure at once: what `wait` has collected already cannot be told to save."""
    text = sbatch_script(
        build_config({"run": {"dir": str(tmp_path)}, "train": {"global_batch_size": 64, "micro_batch_size": 2}}), "a", [], JOB
    )
    head, call = text.split("srun --kill", 1)
    text = (
        head
        + "bash -c 'exit 3' &\nstep=$!\nwhile kill -0 $step 2>/dev/null; do /bin/sleep 0.02; done\n"
        + call.split("step=$!\n")[1]
    )
    text = text.replace('\nwait "$step"\nfinish $?', "\nkill -USR1 $$\n/bin/sleep 5")
    text = 'scontrol() { echo "$@" >&2; }\nexport SLURM_JOB_ID=7\n' + text
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3 and "requeue" not in done.stderr


def test_our_packages_are_found_where_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And where they are installed, nothing is added to the path."""
    checkout = tmp_path / "a checkout"
    for package in ("launch", "data", "trainer", "model"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "small.toml").write_text('[run]\ndir = "out"\n')
    (checkout / "data.py").write_text("raise SystemExit('not ours')")
    command = [sys.executable, "-m", "launch", "slurm", "small.toml", "--gpus-per-node", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
    text = (checkout / "small.sbatch").read_text()
    line = f"export PYTHONPATH='{checkout}'${{PYTHONPATH:+:$PYTHONPATH}}\n"
    assert line in text and "export PYTHONSAFEPATH=1" in text
    ask = f"export PYTHONSAFEPATH=1\n{line}{sys.executable} -c 'import data, launch; print(data.__file__, launch.__file__)'"
    for before in ({}, {"PYTHONPATH": "/nowhere"}):
        found = subprocess.check_output(["bash", "-c", ask], cwd=checkout, env={**environment, **before}, text=True)
        assert found.split(f"{checkout}/")[1:] == ["data/__init__.py ", "launch/__init__.py\n"]
    site = Path(sysconfig.get_paths(vars={"base": str(tmp_path / "site"), "platbase": str(tmp_path / "site")})["purelib"])
    site.mkdir(parents=True)
    (site / "checkout.pth").write_text(f"{checkout}\n")
    python = tmp_path / "site/bin/python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "site/pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    monkeypatch.setattr(slurm, "ROOT", checkout)
    assert slurm._is_installed(str(python)), "an editable install"
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    assert not slurm._is_installed(str(python)), "an install of another checkout"


def test_the_command_writes_the_script_and_the_folder_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text('[run]\ndir = "out"\n')
    app = Typer()
    app.command()(slurm_command)
    result = CliRunner().invoke(app, ["small.toml", "--nodes", "2", "--gpus-per-node", "2"])
    assert result.exit_code == 0, result.output
    assert "submit it with: sbatch small.sbatch" in result.output
    (tmp_path / "small.toml").rename(tmp_path / "my small.toml")
    spaced = CliRunner().invoke(app, ["my small.toml", "--gpus-per-node", "2"])
    assert "submit it with: sbatch 'my small.sbatch'" in spaced.output
    assert (tmp_path / "small.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=out\n")
    assert (tmp_path / "out/logs").is_dir()


@pytest.mark.parametrize(
    ("overrides", "output", "sentence"),
    [
        ([], "/proc/no/x.sbatch", "--output /proc/no/x.sbatch cannot be written (No such file or directory)"),
        ([], ".", "--output . cannot be written (Is a directory); name a file where you can write"),
        (["run.dir=small.toml/x"], None, "run.dir: small.toml/x/logs cannot be made (Not a directory); choose a place"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, overrides, output, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text('[run]\ndir = "out"\n')
    with pytest.raises(ValueError) as caught:
        slurm_command(Path("small.toml"), overrides, gpus_per_node=2, output=output and Path(output))
    assert sentence in str(caught.value)


def test_help_fits_a_screen_and_has_an_example():
    app = Typer()
    app.command()(slurm_command)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "Example: tiglon slurm" in text
    assert len(text.splitlines()) <= 40
