"""A Hugging Face folder may be a stranger's: what its files say leads nowhere, takes no memory and runs nothing."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch.commands.import_model import import_model
from tests.model.huggingface.stock import ALL, save_stock

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stock") / "model"
    save_stock(next(case for case in ALL if case.family == "llama"), directory)
    return directory


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A whole Llama in one file, beside a file of the same weights outside its folder."""
    shutil.copytree(original, tmp_path / "outer/model")
    shutil.copy(original / WEIGHTS, tmp_path / "outer/secret.safetensors")
    return tmp_path / "outer/model"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Address space for 8 GiB more than this process has: what a hostile size asks for does not fit."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def sentence(folder: Path) -> str:
    """With which the import is refused; nothing is written."""
    output = folder.parent.parent / "imported"
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        import_model(folder, output)
    assert not output.exists() and "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


def named_by_index(folder: Path, file: Any) -> None:
    """Have an index say that all tensors are in this file."""
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS), framework="pt") as weights:
        names = list(weights.keys())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))


def test_a_folder_of_links_is_imported(folder: Path, tmp_path: Path) -> None:
    """As the cache of the hub is: the name stays inside, what it links to need not."""
    named_by_index(folder, "model-00001-of-00001.safetensors")
    (tmp_path / "blobs").mkdir()
    (folder / WEIGHTS).rename(tmp_path / "blobs/abc")
    (folder / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "blobs/abc")
    assert import_model(folder, tmp_path / "imported") and (tmp_path / "imported/manifest.json").is_file()


@pytest.mark.parametrize("name", ["../secret.safetensors", "x/../../secret.safetensors", "ABSOLUTE"])
def test_an_index_that_names_a_file_outside_is_refused(folder: Path, name: str) -> None:
    (folder / "x").mkdir()
    named_by_index(folder, str(folder.parent / "secret.safetensors") if name == "ABSOLUTE" else name)
    assert "secret.safetensors" in sentence(folder)


@pytest.mark.parametrize(
    "name",
    [INDEX, ".", "..", "config.json", "nowhere.safetensors", "a\0b", "", 7, None, ["x"], {"a": 1}],
    ids=str,
)
def test_an_index_that_names_no_weights_is_refused(folder: Path, name: Any) -> None:
    named_by_index(folder, name)
    sentence(folder)


def test_a_pointer_of_git_lfs_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in sentence(folder)


def header(size: int) -> bytes:
    return size.to_bytes(8, "little")


TABLE = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "header of gigabytes": lambda: header(1 << 40) + b"{}",
    "header of all": lambda: header((1 << 64) - 1) + b"{}",
    "header longer than the file": lambda: header(1000) + b"{}",
    "deep header": lambda: header(400_000) + b"[" * 400_000,
    "huge shape": lambda: header(len(json.dumps(TABLE))) + json.dumps(TABLE).encode(),
    "pickle": lambda: b"\x80\x04\x95" + bytes(100),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_safetensors_file_is_refused(folder: Path, case: str) -> None:
    (folder / WEIGHTS).write_bytes(FILES[case]())
    assert "safetensors" in sentence(folder)


SIZES = {
    "num_hidden_layers": 10**9,
    "hidden_size": 10**15,
    "intermediate_size": 10**15,
    "vocab_size": 10**15,
    "num_attention_heads": 10**9,
    "num_key_value_heads": 10**9,
    "head_dim": 10**12,
}


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_the_files_do_not_have_is_refused_before_anything_is_built(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: SIZES[key]}))
    sentence(folder)


@pytest.mark.parametrize(
    "content",
    ["[1]", '"x"', "7", "null", "{", "9" * 5000, "[" * 200_000, "\udcff"],
    ids=range(8),
)
def test_another_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "config.json" in sentence(folder)


def test_pickled_weights_are_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    """Unpickling this file would leave a mark."""

    class Mark:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    (folder / WEIGHTS).unlink()
    torch.save({"model.norm.weight": Mark()}, folder / "pytorch_model.bin")
    said = sentence(folder)
    assert not (tmp_path / "executed").exists()
    assert "pytorch_model.bin" in said and "convert" in said


def test_code_beside_a_model_never_runs(folder: Path, tmp_path: Path) -> None:
    """Whether the key is refused or passed over."""
    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    try:
        import_model(folder, tmp_path / "imported")
    except ValueError as error:
        assert "auto_map" in str(error)
    assert not (tmp_path / "executed").exists()


def test_a_tensor_that_the_network_lacks_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file

    save_file(load_file(folder / WEIGHTS) | {"../x": torch.zeros(1)}, folder / WEIGHTS, {"format": "pt"})
    assert "../x" in sentence(folder)
