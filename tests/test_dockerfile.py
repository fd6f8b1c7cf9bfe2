"""The Dockerfile: what it builds from is here, what it relies on is so, and the wheel of its context is the whole program.

A builder is no part of the suite: docs/launch.md has the command.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHON_OF = {"ubuntu22.04": (3, 10), "ubuntu24.04": (3, 12)}
"""What apt calls python3."""


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and its arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def test_two_stages_of_one_base_end_as_a_user_who_is_not_root():
    given = instructions()
    assert [rest for name, rest in given if name == "FROM"] == ["${BASE} AS build", "${BASE}"]
    last = given[max(at for at, (name, _) in enumerate(given) if name == "FROM") :]
    assert [rest for name, rest in last if name == "USER"] == ["tiglon"]
    after = [name for name, _ in last[[name for name, _ in last].index("USER") :]]
    assert "RUN" not in after and ("ENTRYPOINT", '["tiglon"]') in last and "tiglon" in PROJECT["scripts"]
    assert not [rest for name, rest in last if name == "COPY"], "the source stays in the first stage"


def test_the_base_has_a_python_that_tiglon_takes():
    base = next(rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE="))
    found = re.fullmatch(r"BASE=nvidia/cuda:(\d+)\.\d+\.\d+-base-(ubuntu[\d.]+)", base)
    assert found, base
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least and PYTHON_OF[found[2]] >= (int(least[1]), int(least[2]))


def test_the_image_names_no_version_that_pyproject_names():
    """Else the two would differ one day."""
    packages = {re.split(r"[\[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]}
    text = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert not [name for name in packages if re.search(rf"\b{re.escape(name)}\s*[<>=]", text)]


def context(to: Path) -> Path:
    """A copy of what .dockerignore lets through, of the files that git knows or would know."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and all(re.fullmatch(r"!?[\w.*/]+", line) for line in lines)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in allowed)
    for name in listed:
        if name.split("/")[0] in allowed and not fnmatch(name, "*__pycache__*") and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


@pytest.mark.slow
def test_the_wheel_of_the_context_has_every_file_of_the_packages(tmp_path: Path):
    """As the first stage builds it, with the setuptools that is installed instead of one that is fetched."""
    source = context(tmp_path / "source")
    packed = {
        path.relative_to(source).as_posix()
        for package in ("data", "launch", "model", "trainer")
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        tmp_path,
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"tiglon-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert packed | {"tiglon.py"} == {name for name in names if ".dist-info/" not in name}
    assert {path.rpartition(".")[2] for path in packed} == {"py", "toml", "cpp", "typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
