"""The doctor's sentences, on machines that are not this one."""

import importlib.util
import shutil
import socket
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from launch.commands import doctor
from launch.commands.doctor import Machine, doctor_command, examine, inspect_machine
from launch.load_config import build_config
from launch.runtime import environment

LAPTOP = Machine((), 0, 16 * 10**9, 4, {"g++": "/usr/bin/g++"})
CLUSTER = Machine(("NVIDIA H100",) * 2, 80 * 10**9, 10**12, 64, {"g++": "/usr/bin/g++", "nvidia-smi": "/usr/bin/nvidia-smi"})


def problems(config=None, machine=LAPTOP, environment=None) -> str:
    return "\n".join(finding.text for finding in examine(config, machine, environment or {}) if finding.kind == "problem")


def said(config=None, machine=LAPTOP, environment=None) -> str:
    return "\n".join(finding.text for finding in examine(config, machine, environment or {}))


def test_this_computer_is_described():
    here = inspect_machine(environment())
    assert here.cores >= 1
    assert here.host_memory_bytes > 0
    assert f"torch {torch.__version__}" in said(machine=here)
    assert "give a configuration" in said(machine=here)


def test_a_driver_without_a_cuda_build_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    machine = replace(LAPTOP, tools={"nvidia-smi": "/usr/bin/nvidia-smi"})
    assert "there is an NVIDIA driver, but torch" in problems(machine=machine)
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in said(machine=machine, environment={"CUDA_VISIBLE_DEVICES": ""})


def test_versions_that_were_never_run(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    text = problems()
    assert "torch is 2.8.0; tiglon is tested with 2.11 to 2.13" in text
    assert "deepspeed is 0.0.1, but tiglon uses internals of 0.19.8" in text


def test_a_host_without_an_address(monkeypatch):
    def nowhere(name):
        raise OSError

    monkeypatch.setattr(socket, "gethostbyname", nowhere)
    assert "has no address, so gloo cannot bind" in problems()
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert "set GLOO_SOCKET_IFNAME to the device that joins them" in said()


def test_compile_without_a_compiler():
    bare = replace(LAPTOP, tools={})
    assert "train.compile = true needs a C++ compiler" in problems(build_config({}, ["train.compile=true"]), bare)
    assert "C++" not in problems(build_config({}), bare)


def test_missing_data_a_full_disk_and_too_little_memory(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 1000))
    config = build_config({"run": {"dir": str(tmp_path / "run")}}, [f"data.train={tmp_path}/nowhere"])
    text = problems(config, replace(LAPTOP, host_memory_bytes=10**6))
    assert f"no prepared corpus at '{tmp_path}/nowhere'" in text
    assert "checkpoints of" in text and "free some space or lower checkpoint.keep" in text
    assert "1 rank here needs about" in text and "see tiglon plan for a smaller layout" in text
    assert "data.train is empty" in problems(build_config({}))


def test_two_gpus_and_a_batch_that_does_not_divide():
    assert "2 x NVIDIA H100, 80 GB each" in said(machine=CLUSTER)
    config = build_config({"train": {"global_batch_size": 3, "micro_batch_size": 3}})
    assert "on the 2 ranks of this computer: train.global_batch_size = 3 is not a multiple" in said(config, CLUSTER)


def test_a_laptop_is_asked_for_the_fewest_ranks_that_share_a_sequence():
    shared = ["parallel.context_parallel_size=2", "parallel.tensor_parallel_size=2"]
    assert "4 ranks here need about" in said(build_config({}, shared))
    assert "on the 2 ranks of this computer: 2 ranks cannot form groups" in said(build_config({}, shared), CLUSTER)


def test_an_extra_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "wandb is not installed: pip install 'tiglon[wandb]'" in problems(build_config({}, ["log.wandb=mine"]))


def test_a_tracker_without_an_account(monkeypatch, tmp_path):
    config = build_config({}, ["log.tracker=wandb", "log.project=mine"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    nowhere = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    known = "log.tracker = 'wandb': no key for api.wandb.ai is known: run wandb login"
    assert known in problems(config, environment=nowhere)
    for name, value in (("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "offline")):
        assert "wandb" not in problems(config, environment={**nowhere, name: value})
    (tmp_path / "settings").write_text("[default]\nmode = offline\n")  # of `wandb offline`
    assert "wandb" not in problems(config, environment=nowhere)
    (tmp_path / "settings").unlink()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert "wandb" not in problems(config, environment=nowhere)
    assert "no key for w.example is known" in problems(config, environment={**nowhere, "WANDB_BASE_URL": "https://w.example/a"})


def test_a_place_that_takes_no_files(tmp_path):
    (tmp_path / "file").write_text("")
    config = build_config({"run": {"dir": f"{tmp_path}/file/run"}})
    assert f"{tmp_path}/file is not a directory, so {tmp_path}/file/run cannot be written: choose another" in problems(config)
    config = build_config({"run": {"dir": "/proc/run"}})
    assert "no file can be created in /proc (No such file or directory), so /proc/run cannot be written" in problems(config)
    config = build_config({"run": {"dir": str(tmp_path)}, "checkpoint": {"directory": f"{tmp_path}/file"}})
    assert f"so {tmp_path}/file cannot be written" in problems(config)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("text", "status", "last"), [("", 1, "1 problem"), ('[data]\ntrain = "DIR"\n', 1, "1 problem")])
def test_the_exit_status_says_whether_something_stands_in_the_way(tmp_path, text, status, last):
    path = tmp_path / "config.toml"
    path.write_text(text.replace("DIR", str(tmp_path / "none")))
    app = Typer()
    app.command()(doctor_command)
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == status
    assert result.output.splitlines()[-1] == last
    assert CliRunner().invoke(app, []).output.splitlines()[-1] == "no problem found"


def test_help_fits_a_screen_and_has_an_example():
    app = Typer()
    app.command()(doctor_command)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "Example: tiglon doctor" in text
    assert len(text.splitlines()) <= 40
