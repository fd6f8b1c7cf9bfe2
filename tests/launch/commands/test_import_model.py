"""Hugging Face models imported as checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoints import read_meta, read_tensor
from launch.commands.export import export_model
from launch.commands.import_model import import_model
from launch.load_config import build_config
from launch.train import main
from model.decoder import Decoder
from model.parallel.layers import serial_kit
from tests.launch.commands.test_export import MODELS, TEXT, network, saved, stock, tokenizer  # noqa: F401 (a fixture)
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", ["tied plain", "half-swap gqa", "yarn", "qwen windows", "latent"])
def test_import_then_export_is_the_identity(name: str, tmp_path: Path, tokenizer: str) -> None:  # noqa: F811
    model, position, _ = MODELS[name]
    decoder, config = network(model, position)
    checkpoint = saved(tmp_path, decoder, config, torch.bfloat16)
    export_model(checkpoint, tmp_path / "first", tokenizer=tokenizer)
    import_model(tmp_path / "first", tmp_path / "imported")
    assert torch.equal(read_tensor(tmp_path / "imported", "weight/model.norm.weight"), decoder.model.norm.weight.bfloat16())
    assert read_meta(tmp_path / "imported").step == 0
    export_model(str(tmp_path / "imported"), tmp_path / "second")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        first, second = (json.loads((tmp_path / which / file).read_text()) for which in ("first", "second"))
        assert first == second
    one, two = stock(tmp_path / "first").state_dict(), stock(tmp_path / "second").state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def train_main(rank: int, world_size: int, arguments: list[str]) -> int:
    return main(arguments)


def test_training_goes_on_from_an_imported_model(tmp_path: Path, corpus: Path) -> None:
    decoder, config = network({"tied_head": "plain", "num_key_value_heads": 2})
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none")
    import_model(tmp_path / "out", tmp_path / "in")
    overrides = [
        f"run.dir={tmp_path}/run", f"data.train={corpus}/shards/train", f"data.tokenizer={corpus}/tokenizer", "train.steps=1",
        f"checkpoint.resume={tmp_path}/in", "checkpoint.reset_optimizer=true", "train.precision=fp32", "optimizer.name=adamw",
        "optimizer.adamw.learning_rate=1e-30", "run.device=cpu", "log.tensorboard=false",
    ]  # fmt: skip
    assert run_ranks(train_main, 1, [str(tmp_path / "in" / "config.toml"), *overrides], grouped=False) == [0]
    for name, parameter in decoder.named_parameters():
        assert torch.equal(read_tensor(tmp_path / "run/checkpoints/step-00000001", f"weight/{name}"), parameter)


def _edited(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    decoder, config = network({"tied_head": "plain"})
    out = tmp_path / "out"
    export_model(saved(tmp_path, decoder, config), out, tokenizer="none")
    with pytest.raises(FileNotFoundError, match="it has no config"):
        import_model(tmp_path, tmp_path / "new")
    for changed, sentence in (
        ({"model_type": "gpt2"}, "has model_type = 'gpt2'; those that can be imported"),
        ({"model_type": "llama", "attention_bias": True}, "lacks model.layers.0.self_attn.*bias and 7 more"),
        ({"attention_bias": 0}, "attention_bias = 0 must be true or false"),
        ({"attention_bias": False, "num_hidden_layers": 3}, "lacks model.layers.2.* and 8 more"),
        ({"num_hidden_layers": 1}, "has model.layers.1.* and 8 more, which does not fit"),
        ({"num_hidden_layers": 2, "vocab_size": 500}, r"shape \(512, 32\), its config.json asks for \(500, 32\)"),
        ({"num_hidden_layers": 10**8}, "has num_hidden_layers = 100000000, but there are 20 tensors"),
        ({"num_hidden_layers": 2, "vocab_size": 512, "mystery": 1}, "config.json: mystery = 1 is not known to tiglon"),
    ):
        _edited(out, **changed)
        with pytest.raises(ValueError, match=sentence):
            import_model(out, tmp_path / "new")
    changed = json.loads((out / "config.json").read_text())
    del changed["mystery"]
    (out / "config.json").write_text(json.dumps({**changed, "eos_token_id": "x"}))
    with pytest.raises(ValueError, match="eos_token_id = 'x' must be the id of a token, a list of ids or null"):
        import_model(out, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_model(out, out)


def test_a_network_without_rms_norm_eps_gives_transformers_logits(tmp_path: Path) -> None:
    decoder, config = network({"num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 0.1})
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none")
    file = tmp_path / "out" / "config.json"
    written = json.loads(file.read_text())
    left_out = ("rms_norm_eps", "initializer_range", "architectures", "hidden_act")
    file.write_text(json.dumps({key: value for key, value in written.items() if key not in left_out}))
    import_model(tmp_path / "out", tmp_path / "in")
    read = build_config(read_meta(tmp_path / "in").config)
    back = Decoder(read.model, read.position, 64, serial_kit())
    back.load_state_dict({name: read_tensor(tmp_path / "in", f"weight/{name}") for name, _ in back.named_parameters()})
    tokens = torch.tensor([list(TEXT.encode()[:48])])
    with torch.no_grad():
        theirs = stock(tmp_path / "out")(tokens).logits
        torch.testing.assert_close(back(tokens), theirs, atol=1e-4, rtol=0)
        assert (decoder(tokens) - theirs).abs().max() > 1e-2, "the old epsilon would show"


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    """What git leaves without git-lfs, and what an interrupted download leaves."""
    decoder, config = network({"tied_head": "plain"})
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n".encode()
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    names = dict.fromkeys((name for name, _ in decoder.named_parameters()), "model-00001-of-00002.safetensors")
    index = json.dumps({"weight_map": names}).encode()
    edited = whole["config.json"].replace
    for name, content, sentence in (
        ("model.safetensors", pointer, "model.safetensors is a Git LFS pointer, not the file itself; run git lfs pull"),
        ("config.json", pointer, "config.json is a Git LFS pointer"),
        ("tokenizer.json", pointer, "tokenizer.json is a Git LFS pointer"),
        ("model.safetensors", whole["model.safetensors"][:-5], "model.safetensors is not a whole safetensors file"),
        ("model.safetensors", b"", "model.safetensors is not a whole safetensors file"),
        ("config.json", b"<html>", "config.json' is not JSON (Expecting value"),
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("config.json", edited(b'"vocab_size": 512', b'"vocab_size": null'), "json: vocab_size is missing or null; add it"),
        ("config.json", edited(b'"vocab_size": 512', b'"vocab_size": "5"'), "vocab_size = '5' is no whole number"),
        ("config.json", edited(b'"default"', b'"linear"'), "config.json: rope_parameters.factor is missing or null"),
        ("model.safetensors.index.json", index, "model-00001-of-00002.safetensors is not there, though"),
    ):  # fmt: skip
        (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
            import_model(tmp_path / "out", tmp_path / "new")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("*new*")), "a refused import leaves nothing"
        if name in whole:
            (tmp_path / "out" / name).write_bytes(whole[name])
        else:
            (tmp_path / "out" / name).unlink()
    import_model(tmp_path / "out", tmp_path / "new")
