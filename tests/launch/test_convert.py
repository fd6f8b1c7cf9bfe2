"""Exported models in stock transformers, and back."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.fast_tokenizer import tokenizer_files
from data.foreign import import_tokenizer
from data.tokenizer import Tokenizer, train_tokenizer
from launch import convert
from launch.config import build
from launch.convert import export_command, export_model, import_command, import_model
from launch.train import main
from model.decoder import Decoder, initialise
from model.layers import serial
from model.weights import DEFAULTS, imported_config
from tests.ranks import run_ranks
from trainer.checkpoint import Checkpoints, Meta, Shard, read_meta, read_tensor
from trainer.config import CheckpointConfig

TEXT = (Path(convert.__file__).parent.parent / "model" / "positions.py").read_text()
SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "residual_init": "plain",
}  # fmt: skip
LATENT = {
    "attention": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "rms_norm_eps": 1e-6,
}  # fmt: skip


def trained(folder: Path, kind: str) -> str:
    """Directory of a tokenizer trained on this repository's own text."""
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([str(folder / "text.txt")], str(folder / "tokenizer"), 512, model=kind)
    return str(folder / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-pair tokenizer."""
    return trained(tmp_path_factory.mktemp("bpe"), "bpe")


def network(model: dict[str, Any], position: dict[str, Any] | None = None, length: int = 64) -> tuple[Decoder, dict[str, Any]]:
    """A network with random weights (gains too) and its resolved configuration."""
    config = build({"model": {**SIZES, **model}, "position": position or {}, "train": {"sequence_length": length}})
    decoder = Decoder(config.model, config.position, length, serial())
    initialise(decoder, 3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return decoder, config.model_dump(mode="json")


def saved(folder: Path, decoder: Decoder, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> str:
    shards = [
        Shard(f"weight/{name}", tuple(p.shape), tuple(p.shape), (0,) * p.dim(), 0, p.detach().to(dtype).reshape(-1))
        for name, p in decoder.named_parameters()
    ]
    kept = Checkpoints(str(folder / "checkpoints"), CheckpointConfig(asynchronous=False), 0, 1, None, lambda text: None)
    kept.save(shards, Meta(7, 99, config))
    kept.close()
    return str(folder / "checkpoints" / "step-00000007")


def stock(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tied plain": ({"tied_head": "plain"}, {}, "LlamaForCausalLM"),
    "half-swap gqa": ({"num_key_value_heads": 2}, {"rope_theta": 500.0}, "LlamaForCausalLM"),
    "projection mqa": ({"num_key_value_heads": 1, "tied_head": "projection"}, {}, "LlamaForCausalLM"),
    "untied wide heads": ({"tie_word_embeddings": False, "head_dim": 12}, {}, "LlamaForCausalLM"),
    "small-init, pi": ({"tied_head": "small-init"}, {"kind": "pi", "factor": 4.0}, "LlamaForCausalLM"),
    "ntk": ({}, {"kind": "ntk", "factor": 4.0}, "LlamaForCausalLM"),
    "yarn": ({}, {"kind": "yarn", "factor": 4.0, "yarn_ramp": "index"}, "LlamaForCausalLM"),
    "qwen": ({"qk_norm": "rms", "num_key_value_heads": 2, "head_dim": 10}, {}, "Qwen3ForCausalLM"),
    "qwen windows": (
        {"qk_norm": "rms", "sliding_window": 9, "full_attention_layers": [-1]},
        {},
        "Qwen3ForCausalLM",
    ),
    "mistral": ({"sliding_window": 9, "num_key_value_heads": 2}, {}, "MistralForCausalLM"),
    "latent": ({**LATENT, "q_lora_rank": 16}, {}, "DeepseekV3ForCausalLM"),
    "latent, full queries, untied": ({**LATENT, "tie_word_embeddings": False}, {}, "DeepseekV3ForCausalLM"),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_gives_our_logits(name: str, tmp_path: Path) -> None:
    model, position, architecture = MODELS[name]
    decoder, config = network(model, position)
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none")
    theirs = stock(tmp_path / "out")
    assert type(theirs).__name__ == architecture
    tokens = torch.tensor([list(TEXT.encode()[:96]), list(TEXT.encode()[500:596])])
    with torch.no_grad():
        ours, stocks = decoder(tokens), theirs(tokens).logits
    assert ours.std() > 0.3
    torch.testing.assert_close(stocks, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_exported_tokenizer_is_ours(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, kind)
    ours = Tokenizer.load(tokenizer)
    decoder, config = network({"vocab_size": ours.vocab_size})
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    odd = ["", " ", "\u2581x \u2581", "naïve 中文 🎉 \x00", "<|end_of_text|> <unk> <0x41>", "\n\n\t", "3.14159 x 27"]
    for text in [*odd, *TEXT.split("\n\n"), TEXT]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ids) == text
        assert ids == ours.encode(text)
    assert theirs.eos_token_id == ours.end_of_text == stock(tmp_path / "out").config.eos_token_id


def test_export_from_a_run_in_bf16_and_parts(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "FILE_BYTES", 30_000)
    decoder, config = network({"tied_head": "plain"})
    config["data"]["tokenizer"] = tokenizer
    told = export_model(convert.find(str(Path(saved(tmp_path, decoder, config)).parent.parent)), tmp_path / "out", "bfloat16")
    assert told[0].endswith(f"as LlamaForCausalLM (bfloat16) to {tmp_path / 'out'}")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0].startswith("model-00001-of-0")
    theirs = stock(tmp_path / "out")
    assert torch.equal(theirs.model.norm.weight, decoder.model.norm.weight.bfloat16())
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, decoder.model.layers[1].mlp.up_proj.weight.bfloat16())


@pytest.mark.parametrize("name", ["tied plain", "half-swap gqa", "yarn", "qwen windows", "latent"])
def test_import_then_export_is_the_identity(name: str, tmp_path: Path, tokenizer: str) -> None:
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


REFUSED: list[tuple[dict[str, Any], dict[str, Any], bool, str]] = [
    (
        {},
        {"kind": "rerope", "window": 16},
        False,
        "read as plain RoPE: distances from 16 tokens on differ; export with --lossy",
    ),
    ({}, {"log_n": "trained"}, False, "log n scale of the queries, which the model was trained with"),
    ({"qk_norm": "key-l2"}, {}, True, "key-l2' has no stock architecture"),
    ({}, {"kind": "none"}, True, "position.kind = 'none' has no stock architecture"),
    ({}, {"kind": "ntk-mixed", "factor": 2.0}, True, "ntk-mixed' has no stock architecture"),
    ({**LATENT, "rms_norm_eps": 1e-5}, {}, False, "adds 1e-06 in the norms of the latents, the model was trained with 1e-05"),
    ({"sliding_window": 8, "full_attention_layers": [0]}, {}, True, "sliding_window in some layers only needs qk_norm = 'rms'"),
]


@pytest.mark.parametrize("model, position, lossy, sentence", REFUSED)
def test_what_has_no_stock_architecture_is_refused(
    model: dict[str, Any], position: dict[str, Any], lossy: bool, sentence: str, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, *network(model, position))
    with pytest.raises(ValueError, match=sentence):
        export_model(checkpoint, tmp_path / "out", tokenizer="none", lossy=lossy)
    assert not (tmp_path / "out").exists()


def test_a_lossy_export_says_what_is_lost_and_keeps_the_rest(tmp_path: Path) -> None:
    decoder, config = network({}, {"kind": "rerope", "window": 40})
    told = export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none", lossy=True)
    assert told[1] == "lost: position.kind = 'rerope' is read as plain RoPE: distances from 40 tokens on differ"
    tokens = torch.tensor([list(TEXT.encode()[:60])])
    with torch.no_grad():
        ours, stocks = decoder(tokens), stock(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(stocks[:, :40], ours[:, :40], atol=1e-4, rtol=0)
    assert (stocks[:, 40:] - ours[:, 40:]).abs().max() > 1e-3


def test_the_commands_tell_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder, config = network({"tied_head": "plain"})
    saved(tmp_path, decoder, config)
    export_command(str(tmp_path), tmp_path / "out", tokenizer="none")
    import_command(tmp_path / "out", tmp_path / "in")
    said = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert said == [
        f"exported {tmp_path}/checkpoints/step-00000007 as LlamaForCausalLM (float32) to {tmp_path}/out",
        "without a tokenizer",
        f"imported {tmp_path}/out ({count:,} parameters) to {tmp_path}/in",
        f"a configuration to train it with: {tmp_path}/in/config.toml",
    ]
    with pytest.raises(FileNotFoundError, match=r"the tokenizer of .* is not at ''; give --tokenizer DIR, or --tokenizer none"):
        export_command(str(tmp_path), tmp_path / "again")
    with pytest.raises(ValueError, match="--dtype int8: legal are stored, float32, bfloat16"):
        export_command(str(tmp_path), tmp_path / "again", "int8")


def train_main(rank: int, world_size: int, arguments: list[str]) -> int:
    return main(arguments)


def test_training_goes_on_from_an_imported_model(tmp_path: Path, corpus: Path) -> None:
    decoder, config = network({"tied_head": "plain", "num_key_value_heads": 2})
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none")
    import_model(tmp_path / "out", tmp_path / "in")
    overrides = [
        f"run.dir={tmp_path}/run", f"data.train={corpus}/shards/train", f"data.tokenizer={corpus}/tokenizer", "train.steps=1",
        f"checkpoint.resume={tmp_path}/in", "checkpoint.reset_optimizer=true", "train.precision=fp32", "optimizer.name=adamw",
        "optimizer.learning_rate=1e-30", "run.device=cpu", "log.tensorboard=false",
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
        ({"architectures": ["GPT2LMHeadModel"]}, "is a GPT2LMHeadModel; those that can be imported"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias = True"),
        ({"attention_bias": False, "num_hidden_layers": 3}, "lacks model.layers.2.* and 8 more"),
        ({"num_hidden_layers": 1}, "has model.layers.1.* and 8 more, which does not fit"),
        ({"num_hidden_layers": 2, "vocab_size": 500}, r"shape \(512, 32\), its config.json asks for \(500, 32\)"),
        ({"vocab_size": 512, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = 'llama3'"),
    ):
        _edited(out, **changed)
        with pytest.raises(ValueError, match=sentence):
            import_model(out, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="is there already and not empty"):
        import_model(out, out)


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_a_key_that_is_left_out_has_the_default_of_transformers_class(architecture: str) -> None:
    fields = getattr(transformers, architecture.replace("ForCausalLM", "Config")).__dataclass_fields__
    theirs = {key: fields[key].default for key in DEFAULTS[architecture]}
    assert {key: getattr(value, "default", value) for key, value in theirs.items()} == DEFAULTS[architecture]
    model, position, length = imported_config({"architectures": [architecture], "first_k_dense_replace": 99}, "config.json")
    assert model["rms_norm_eps"] == 1e-6 and position == {"kind": "rope", "rope_theta": 10000.0}
    assert length == fields["max_position_embeddings"].default
    assert model.get("sliding_window") == (4096 if architecture.startswith("Mistral") else None)
    assert model.get("head_dim") == (128 if architecture.startswith("Qwen") else None), "not hidden_size / heads"
    assert not model["tie_word_embeddings"]


def test_a_network_without_rms_norm_eps_gives_transformers_logits(tmp_path: Path) -> None:
    decoder, config = network({"num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 0.1})
    export_model(saved(tmp_path, decoder, config), tmp_path / "out", tokenizer="none")
    file = tmp_path / "out" / "config.json"
    written = json.loads(file.read_text())
    left_out = ("rms_norm_eps", "initializer_range", "architectures", "hidden_act")
    file.write_text(json.dumps({key: value for key, value in written.items() if key not in left_out}))
    import_model(tmp_path / "out", tmp_path / "in")
    read = build(read_meta(tmp_path / "in").config)
    back = Decoder(read.model, read.position, 64, serial())
    back.load_state_dict({name: read_tensor(tmp_path / "in", f"weight/{name}") for name, _ in back.named_parameters()})
    tokens = torch.tensor([list(TEXT.encode()[:48])])
    with torch.no_grad():
        theirs = stock(tmp_path / "out")(tokens).logits
        torch.testing.assert_close(back(tokens), theirs, atol=1e-4, rtol=0)
        assert (decoder(tokens) - theirs).abs().max() > 1e-2, "the old epsilon would show"


def test_windows_that_begin_at_a_layer_are_those_of_qwen() -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4, "use_sliding_window": True}
    types = transformers.Qwen3Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=3).layer_types
    model, _, _ = imported_config({**config, "max_window_layers": 3}, "config.json")
    assert model["sliding_window"] == 4096
    assert model["full_attention_layers"] == [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    assert "sliding_window" not in imported_config(config, "config.json")[0]


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
        ("config.json", b"<html>", "config.json is not JSON (Expecting value"),
        ("config.json", b"[]", "config.json holds no JSON object"),
        ("config.json", edited(b'"vocab_size": 512', b'"vocab_size": null'), "json has no vocab_size; add it"),
        ("config.json", edited(b'"vocab_size": 512', b'"vocab_size": "5"'), "has vocab_size = '5', which is no"),
        ("config.json", edited(b'"default"', b'"linear"'), "config.json: rope_parameters has no factor"),
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


def test_a_foreign_tokenizer_leaves_as_it_came(tokenizer: str, tmp_path: Path) -> None:
    ours = Tokenizer.load(tokenizer)
    for name, content in tokenizer_files(ours, 64).items():
        (tmp_path / name).write_bytes(content)
    foreign = import_tokenizer(str(tmp_path), str(tmp_path / "imported"))
    assert foreign.encode(TEXT) == ours.encode(TEXT) and foreign.end_of_text == ours.end_of_text
    again = tokenizer_files(foreign, 64)
    assert again["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads(again["tokenizer_config.json"])["eos_token"] == "<|end_of_text|>"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(ours.model)
    with pytest.raises(ValueError, match="a foreign sentencepiece model cannot be exported exactly"):
        tokenizer_files(import_tokenizer(str(tmp_path / "model"), str(tmp_path / "other")), 64)
