"""An imported model is the model: its logits, its continuations and, on the way out again, its bits.

The figures of every case: pytest tests/families/test_logits.py -s
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.checkpoints import load_checkpoint, read_meta
from launch.commands.export import export_model
from launch.commands.import_model import import_model
from launch.load_config import build_config
from launch.trained import open_checkpoint
from model.decoder import Decoder
from model.generate import generate
from model.parallel.mesh import make_kit, make_mesh
from tests.families.imported import import_case, read_stock, same_bits, saved, stock_names, stored
from tests.families.quick import cases
from tests.model.huggingface.stock import ALL, Case, stock_logits
from tests.ranks import run_ranks
from trainer.engines.base import make_shards
from trainer.optimizers.expert_balance import ExpertBalance
from trainer.optimizers.fragments import whole_fragments

CPU = torch.device("cpu")
CLOSE = 1e-4
"""Largest difference of logits of 6 to 11. With weights in float64 it is as large: the norms and rotations of transformers are
in float32 whatever the precision of its weights."""
ROUNDING = 1.15
"""Times the RMS error that transformers' logits have in bfloat16: 0.8 to 1.1. Norms computed in bfloat16 give 1.18 for Llama,
Gemma's 1 + w in bfloat16 gives 1.25."""


def tokens(rows: int = 2, length: int = 60) -> Tensor:
    """Ids below the smallest vocabulary, int64; the longer windows of the cases are 12 tokens."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def off(decoder: Decoder, stock: torch.nn.Module, what: object) -> float:
    """Largest difference of logits, printed with how large they are."""
    theirs = stock_logits(stock, tokens())
    found = (decoder(tokens()) - theirs).abs().max().item()
    print(f"{what}: logits off by {found:.1e} of {theirs.abs().max():.1f}")
    return found


@cases
def test_logits_are_those_of_transformers(case: Case, tmp_path: Path):
    imported = import_case(case, tmp_path)
    decoder = open_checkpoint(str(imported.checkpoint), CPU, torch.float32).decoder
    assert off(decoder, imported.stock, case) < CLOSE


@cases
def test_greedy_continuations_are_those_of_transformers(case: Case, tmp_path: Path):
    """Ours with its cache, two prompts of unequal length at once; theirs without one, each prompt alone."""
    imported = import_case(case, tmp_path)
    decoder = open_checkpoint(str(imported.checkpoint), CPU, torch.float32).decoder
    prompts, new = [tokens()[0, :17].tolist(), tokens()[1, :9].tolist()], 50
    ours = list(zip(*generate(decoder, prompts, new), strict=True))
    imported.stock.generation_config.eos_token_id = None  # which would end it
    for prompt, continuation in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = imported.stock.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=False
        )  # fmt: skip
        assert list(continuation) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@cases
def test_bits_are_kept_on_the_way_round(case: Case, dtype: torch.dtype, tmp_path: Path):
    imported = import_case(case, tmp_path, dtype)
    own = stock_names(case, stored(imported.files))
    assert not same_bits(own, saved(imported.checkpoint)), "imported"
    export_model(str(imported.checkpoint), tmp_path / "out", tokenizer="none")
    assert not same_bits(stored(imported.files), stored(tmp_path / "out")), "exported"
    again = read_stock(tmp_path / "out")
    assert again.config.model_type == case.family and again.dtype == dtype
    assert torch.equal(stock_logits(again, tokens()), stock_logits(read_stock(imported.files), tokens()))
    import_model(tmp_path / "out", tmp_path / "again")
    assert not same_bits(own, saved(tmp_path / "again")), "imported again"
    first, second = (read_meta(path) for path in (imported.checkpoint, tmp_path / "again"))
    assert first.config == second.config and first.extra["token_ids"] == second.extra["token_ids"]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (imported.files, tmp_path / "out"))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size"):
        assert before.get(key) == after.get(key), key


def rounding_error(case: Case, difference_BSV: Tensor) -> float:
    """RMS of differences of logits. With experts, of a token in the best quarter: rounding sends others to another expert,
    which moves their logits by any amount."""
    error_T = difference_BSV.square().mean(-1).flatten()
    return (error_T.quantile(0.25) if "num_experts_per_tok" in case.settings else error_T.mean()).sqrt().item()


@cases
def test_logits_in_bfloat16_are_as_near_to_the_truth_as_transformers(case: Case, tmp_path: Path):
    imported = import_case(case, tmp_path, torch.bfloat16)
    rounded, many = open_checkpoint(str(imported.checkpoint), CPU, torch.bfloat16).decoder, tokens(rows=16)
    with torch.no_grad():
        ours, theirs = rounded(many).double(), stock_logits(imported.stock, many).double()
    stock = imported.stock.float()
    decoder = open_checkpoint(str(imported.checkpoint), CPU, torch.float32).decoder
    assert off(decoder, stock, f"{case}, bfloat16 weights in float32") < CLOSE
    truth = stock_logits(stock, many).double()
    our_error, their_error = (rounding_error(case, each - truth) for each in (ours, theirs))
    print(f"{case}, bfloat16: off by {our_error:.1e} (RMS), {our_error / their_error:.2f} times as much as transformers")
    assert our_error < ROUNDING * their_error


def split_logits(rank: int, world_size: int, checkpoints: list[str], sequence_parallel: bool) -> list[Any]:
    """Logits of every checkpoint by a network that is split over the ranks, as numpy's arrays: a tensor would be gone with the
    process that sends it."""
    mesh, found = make_mesh(world_size, CPU), []
    kit = make_kit(mesh, sequence_parallel)
    for checkpoint in checkpoints:
        config = build_config(read_meta(checkpoint).config)
        decoder = Decoder(config.model, config.position, config.train.sequence_length, kit)
        shards = make_shards(whole_fragments(decoder.owned_parameters(), mesh), mesh, partitioned=False)
        load_checkpoint(checkpoint, shards + ExpertBalance(decoder, mesh).shards())
        with torch.no_grad():
            found.append(decoder(tokens()).numpy())
    return found


@pytest.mark.slow
def test_split_over_two_ranks_logits_are_the_same(tmp_path: Path):
    """All cases in the same two processes, those of one key-value head too, which both ranks then compute."""
    made = {str(case): import_case(case, tmp_path / str(number)) for number, case in enumerate(ALL)}
    checkpoints = [str(imported.checkpoint) for imported in made.values()]
    for split in (False, True):
        for found in run_ranks(split_logits, 2, checkpoints, split):
            wrong = {
                name: (torch.from_numpy(logits) - stock_logits(imported.stock, tokens())).abs().max().item()
                for (name, imported), logits in zip(made.items(), found, strict=True)
            }
            assert not {name: error for name, error in wrong.items() if not error < CLOSE}
