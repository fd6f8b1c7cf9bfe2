"""The standard library as a corpus: every UTF-8 source once, in order, whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.standard_library import collect, main, sources


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library with the oddities of a real one."""
    root = tmp_path / "python3"
    files = {
        "b.py": "x = 'ü'\n".encode(),
        "a/z.py": b"def z(): pass\n",
        "a/empty.py": b"\n",
        "a/broken.py": b"\xff\xfe",
        "a/data.txt": b"no code",
        "site-packages/theirs.py": b"import this\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_only_own_readable_sources_in_order(library: Path):
    assert sources(library) == [("a/z.py", "def z(): pass\n"), ("b.py", "x = 'ü'\n")]


def test_the_corpus_is_one_parquet_file(library: Path, tmp_path: Path):
    output = tmp_path / "text" / "library.parquet"
    assert collect(output, library) == (2, len(b"def z(): pass\n") + len("x = 'ü'\n".encode()))
    assert pq.read_table(output).to_pylist() == [
        {"path": "a/z.py", "text": "def z(): pass\n"},
        {"path": "b.py", "text": "x = 'ü'\n"},
    ]
    assert [path.name for path in output.parent.iterdir()] == ["library.parquet"]


def test_a_python_without_sources_is_one_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no Python source files"):
        collect(tmp_path / "library.parquet", tmp_path)
    assert not (tmp_path / "library.parquet").exists()


def test_the_running_python_has_megabytes_of_text(tmp_path: Path):
    output = tmp_path / "library.parquet"
    ended = subprocess.run(
        [sys.executable, "-m", "launch.standard_library", str(output)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0 and "Python's standard library" in ended.stdout
    assert sum(len(text) for text in pq.read_table(output)["text"].to_pylist()) > 5e6


def test_usage(capsys: pytest.CaptureFixture):
    assert main([]) == 2 and main(["--help"]) == 2
    assert "usage: python -m launch.standard_library OUTPUT.parquet" in capsys.readouterr().err
