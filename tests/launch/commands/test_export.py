"""Exported models in stock transformers, and back."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.storage import open_store
from data.tokenizer.huggingface import tokenizer_files
from data.tokenizer.import_model import import_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.train import train_tokenizer
from launch.commands import export
from launch.commands.export import export_command, export_model
from launch.commands.import_model import import_command, import_model
from launch.load_config import build_config
from launch.trained import open_checkpoint
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from tests.model.huggingface.stock import Case, save_stock
from trainer.checkpoint.api import CheckpointMeta, Checkpoints, Shard
from trainer.config import CheckpointConfig

TEXT = (Path(export.__file__).parent.parent / "runtime.py").read_text() + 9 * "\n0123456789 ABCDEF < x >"
"""With the letters of <0x41> in it: an exported unigram model takes that word for the byte where its vocabulary lacks one."""
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
    config = build_config({"model": {**SIZES, **model}, "position": position or {}, "train": {"sequence_length": length}})
    decoder = Decoder(config.model, config.position, length, serial_kit())
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
    kept = Checkpoints(open_store, str(folder / "checkpoints"), CheckpointConfig(asynchronous=False), None, lambda text: None)
    kept.save(shards, CheckpointMeta(7, 99, config))
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
    "smollm, windows, hwfa": (
        {"sliding_window": 9, "full_attention_layers": [-1], "full_attention_position": "none"},
        {},
        "SmolLM3ForCausalLM",
    ),
    "olmo": ({"norm_placement": "post", "qk_norm": "rms-all-heads", "num_key_value_heads": 2}, {}, "Olmo2ForCausalLM"),
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
    monkeypatch.setattr(export, "FILE_BYTES", 30_000)
    decoder, config = network({"tied_head": "plain"})
    config["data"]["tokenizer"] = tokenizer
    run = str(Path(saved(tmp_path, decoder, config)).parent.parent)
    told = export_model(export.find_checkpoint(run), tmp_path / "out", "bfloat16")
    assert told[0].endswith(f"as LlamaForCausalLM (bfloat16) to {tmp_path / 'out'}")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0].startswith("model-00001-of-0")
    theirs = stock(tmp_path / "out")
    assert torch.equal(theirs.model.norm.weight, decoder.model.norm.weight.bfloat16())
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, decoder.model.layers[1].mlp.up_proj.weight.bfloat16())


REFUSED: list[tuple[dict[str, Any], dict[str, Any], bool, str]] = [
    (
        {},
        {"kind": "rerope", "window": 16},
        False,
        "becomes plain RoPE: distances from 16 tokens on differ; export with --lossy",
    ),
    ({}, {"log_n": "trained"}, False, "log n scale of the queries, which the model was trained with"),
    ({"qk_norm": "key-l2"}, {}, True, "no stock architecture computes this network; the nearest: LlamaForCausalLM has qk_norm"),
    ({}, {"kind": "none"}, True, "position.kind = 'none' has no stock architecture"),
    ({}, {"kind": "ntk-mixed", "factor": 2.0}, True, "ntk-mixed' has no stock architecture"),
    ({**LATENT, "rms_norm_eps": 1e-5}, {}, False, "adds 1e-06 in the norms of the latents, the model was trained with 1e-05"),
    (
        {"norm_placement": "post"},
        {},
        True,
        "no stock architecture computes this network; the nearest: LlamaForCausalLM has norm_placement",
    ),
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
    assert told[1] == "lost: position.kind = 'rerope' becomes plain RoPE: distances from 40 tokens on differ"
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
        f"imported {tmp_path}/out (LlamaForCausalLM, {count:,} parameters) to {tmp_path}/in",
        "without a tokenizer: none is beside the model",
        f"a configuration to train it with: {tmp_path}/in/config.toml",
    ]
    with pytest.raises(FileNotFoundError, match=r"the tokenizer of .* is not at ''; give --tokenizer DIR, or --tokenizer none"):
        export_command(str(tmp_path), tmp_path / "again")
    with pytest.raises(ValueError, match="--dtype int8: legal are stored, float32, bfloat16"):
        export_command(str(tmp_path), tmp_path / "again", "int8")


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
    with pytest.raises(ValueError, match="an imported sentencepiece model cannot be exported exactly"):
        tokenizer_files(import_tokenizer(str(tmp_path / "model"), str(tmp_path / "other")), 64)


def test_what_came_in_goes_out_as_what_it_was_after_training_too(tmp_path: Path) -> None:
    """A run that started from an import knows it as its checkpoint.resume."""
    save_stock(Case("phi3", "plain"), tmp_path / "phi")
    import_model(tmp_path / "phi", tmp_path / "in")
    trained = open_checkpoint(str(tmp_path / "in"), torch.device("cpu"), torch.float32)
    config = trained.config.model_dump(mode="json")
    config["checkpoint"]["resume"] = str(tmp_path / "in")
    run = saved(tmp_path, trained.decoder, config)
    export_model(run, tmp_path / "out", tokenizer="none")
    assert type(stock(tmp_path / "out")).__name__ == "Phi3ForCausalLM"
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    export_model(run, tmp_path / "moved", tokenizer="none")
    assert type(stock(tmp_path / "moved")).__name__ == "LlamaForCausalLM", "which computes the same"
