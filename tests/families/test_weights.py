"""Weights that are broken, too many, too few or of another kind: one sentence that names tensor or file, and no output."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.checkpoints import read_tensor
from launch.commands.import_model import import_model
from tests.families.folders import INDEX, distance, edit_config, edit_tensors, file_of, ours, theirs
from tests.families.keys import quiet
from tests.model.huggingface.stock import Case, stock_model

K = "model.layers.1.self_attn.k_proj.weight"
"""[32, 64]: a transposed one has another shape."""
GAIN = "model.layers.1.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(params=["one file", "several files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama, untied."""
    size = "10GB" if request.param == "one file" else "80KB"
    stock_model(Case("llama", "plain")).save_pretrained(tmp_path / "stock", max_shard_size=size)
    assert (tmp_path / "stock" / INDEX).exists() == (request.param == "several files")
    return tmp_path / "stock"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A Llama whose head is its embedding, which is stored once."""
    stock_model(Case("llama", "plain"), tie_word_embeddings=True).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def refused(folder: Path, *words: str) -> None:
    """Importing is refused in one sentence with these words, and nothing is left beside the folder."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        import_model(folder, folder.parent / "imported")
    sentence = str(caught.value)
    assert "\n" not in sentence and not [word for word in words if word not in sentence], sentence
    assert sorted(folder.parent.rglob("*")) == before


def same_or_refused(folder: Path, word: str) -> None:
    """transformers' logits, or a refusal with the word; never another network."""
    try:
        logits = ours(folder, folder.parent / "imported")
    except ValueError as error:
        assert word in str(error) and "\n" not in str(error)
        assert not (folder.parent / "imported").exists()
    else:
        assert distance(theirs(folder), logits) < 1e-5


def test_the_whole_model_is_imported(folder: Path) -> None:
    assert distance(theirs(folder), ours(folder, folder.parent / "imported")) < 1e-5


@pytest.mark.parametrize("name", [K, GAIN, EMBEDDING, HEAD])
def test_a_missing_tensor(folder: Path, name: str) -> None:
    edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    refused(folder, name)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.bias", "model.layers.4.mlp.up_proj.weight", "score.weight"])
def test_a_tensor_too_many(folder: Path, name: str) -> None:
    edit_tensors(folder, K, lambda tensors: tensors.update({name: torch.zeros(32)}))
    refused(folder, name)


@pytest.mark.parametrize(
    "name, change, shapes",
    [
        (K, lambda weight: weight[:-1], ("(31, 64)", "(32, 64)")),
        (K, lambda weight: weight.T, ("(64, 32)", "(32, 64)")),
        (K, lambda weight: weight.flatten(), ("(2048,)", "(32, 64)")),
        (K, lambda weight: weight[None], ("(1, 32, 64)", "(32, 64)")),
        (K, lambda weight: weight[:0], ("(0, 64)", "(32, 64)")),
        (GAIN, lambda weight: weight[:, None], ("(64, 1)", "(64,)")),
        (GAIN, lambda weight: weight[0], ("()", "(64,)")),
        (HEAD, lambda weight: weight.T, ("(64, 96)", "(96, 64)")),
    ],
)
def test_a_wrong_shape(
    folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], shapes: tuple[str, str]
) -> None:
    edit_tensors(folder, name, lambda tensors: tensors.update({name: change(tensors[name])}))
    refused(folder, name, *shapes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("names", [(K,), ()], ids=["one tensor", "all tensors"])
def test_another_precision_is_the_same_network_or_refused(folder: Path, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    for beside in names or json_names(folder):
        edit_tensors(folder, beside, lambda tensors, name=beside: tensors.update({name: tensors[name].to(dtype)}))
    same_or_refused(folder, names[0] if names else ".weight")


def json_names(folder: Path) -> list[str]:
    """Names of all tensors of the model."""
    return list(stock_model(Case("llama", "plain")).state_dict())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_of_no_weights(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, K, lambda tensors: tensors.update({K: tensors[K].to(dtype)}))
    refused(folder, K)


@pytest.mark.parametrize(
    "content",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0" * 8,
        lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
        lambda data: data[:8],
        lambda data: b"",
        lambda data: POINTER,
        lambda data: b"\xff" * 100,
    ],
    ids=["half", "a byte short", "longer", "header alone", "length alone", "empty", "LFS pointer", "noise"],
)
def test_a_broken_file(folder: Path, content: Callable[[bytes], bytes]) -> None:
    path = file_of(folder, K)
    path.write_bytes(content(path.read_bytes()))
    refused(folder, path.name)


def test_a_missing_file(folder: Path) -> None:
    path = file_of(folder, K)
    path.unlink()
    refused(folder, path.name)


def test_a_directory_in_place_of_a_file(folder: Path) -> None:
    path = file_of(folder, K)
    path.unlink()
    path.mkdir()
    refused(folder, path.name)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Llama in several files."""
    stock_model(Case("llama", "plain")).save_pretrained(tmp_path / "stock", max_shard_size="80KB")
    return tmp_path / "stock"


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


def test_an_index_that_lacks_a_tensor(sharded: Path) -> None:
    """transformers reads the files, whatever the index leaves out."""
    index = index_of(sharded)
    del index["weight_map"][K]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, K)


def test_an_index_that_names_the_wrong_file(sharded: Path) -> None:
    index = index_of(sharded)
    index["weight_map"][K] = next(file for file in index["weight_map"].values() if file != index["weight_map"][K])
    (sharded / INDEX).write_text(json.dumps(index))
    same_or_refused(sharded, K)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    """With other values in the second: nobody knows which are meant."""
    index = index_of(sharded)["weight_map"]
    path = next(file for name, file in index.items() if file != index[K])
    beside = next(name for name, file in index.items() if file == path)
    edit_tensors(sharded, beside, lambda tensors: tensors.update({K: torch.ones(32, 64)}))
    refused(sharded, K)


@pytest.mark.parametrize("weight_map", [None, [], "x", {}, {K: 3}, {K: None}, {K: "../elsewhere.safetensors"}])
def test_an_index_that_is_none(sharded: Path, weight_map: object) -> None:
    index = index_of(sharded)
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))
    refused(sharded, *([] if isinstance(weight_map, dict) else [INDEX]))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", POINTER])
def test_an_index_that_is_not_json(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    refused(sharded, INDEX)


def test_weights_as_pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "model.safetensors")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("{}")
    refused(tmp_path / "model", str(tmp_path / "model"))
    refused(tmp_path / "none", str(tmp_path / "none"))


def test_values_are_copied_whatever_they_are(folder: Path) -> None:
    """NaN, infinity and subnormal numbers are weights like any other; transformers loads them too."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-42, -0.0])
    edit_tensors(folder, K, lambda tensors: tensors[K].view(-1)[:5].copy_(values))
    import_model(folder, folder.parent / "imported")
    read = read_tensor(str(folder.parent / "imported"), f"weight/{K}").view(-1)[:5]
    assert torch.equal(read.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_stored_frequencies_are_passed_over(folder: Path, name: str) -> None:
    """As old files of Llama have them; transformers computes its own."""
    inv_freq = 1.0 / 100.0 ** (torch.arange(0, 16, 2) / 16)
    edit_tensors(folder, K, lambda tensors: tensors.update({name.format(layer): inv_freq.clone() for layer in range(4)}))
    assert distance(theirs(folder), ours(folder, folder.parent / "imported")) < 1e-5


def test_a_tied_head_stored_with_the_values_of_the_embedding(tied: Path) -> None:
    edit_tensors(tied, K, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert distance(theirs(tied), ours(tied, tied.parent / "imported")) < 1e-5


@pytest.mark.parametrize("change", [-1.0, 1.001], ids=["far", "near"])
def test_a_tied_head_stored_with_other_values(tied: Path, change: float) -> None:
    """transformers unties it."""
    edit_tensors(tied, K, lambda tensors: tensors.update({HEAD: change * tensors[EMBEDDING]}))
    same_or_refused(tied, HEAD)


def test_a_tied_head_of_another_shape(tied: Path) -> None:
    edit_tensors(tied, K, lambda tensors: tensors.update({HEAD: torch.ones(95, 64)}))
    refused(tied, HEAD, "(95, 64)")


def test_a_tied_head_in_place_of_the_embedding(tied: Path) -> None:
    edit_tensors(tied, K, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    same_or_refused(tied, EMBEDDING)


def test_a_folder_whose_flag_changed(folder: Path) -> None:
    edit_config(folder, {"tie_word_embeddings": True})
    same_or_refused(folder, HEAD)


def test_an_output_that_is_there_is_left_alone(folder: Path) -> None:
    (folder.parent / "imported").mkdir()
    (folder.parent / "imported" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=re.escape(str(folder.parent / "imported"))):
        import_model(folder, folder.parent / "imported")
    assert (folder.parent / "imported" / "mine").read_text() == "mine"
