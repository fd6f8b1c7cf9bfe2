"""The data of one rank, and what a start says of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from launch.config import RunConfig
from launch.inputs import MAX_EPOCHS, check_inputs, open_data
from launch.load_config import build_config
from launch.runtime import ALONE
from tests.shards import write_corpus


def over(train: str, *overrides: str) -> RunConfig:
    sizes = ["train.sequence_length=8", "train.global_batch_size=4", "train.micro_batch_size=1", "model.vocab_size=64"]
    return build_config({}, [f"data.train={train}", "train.steps=10", "run.device=cpu", *sizes, *overrides])


@pytest.fixture
def train(tmp_path: Path) -> str:
    """80 tokens; ten updates of 4 x 8 tokens read them four times."""
    return write_corpus(tmp_path / "train", np.arange(80) % 40 + 2, vocab_size=64)


def test_ranks_split_a_batch_and_tensor_parallel_ranks_read_the_same(train: str):
    whole = torch.cat([batch.inputs_BS for batch in open_data(over(train), 0, 1).train.batches(3)])
    rows = [torch.cat([batch.inputs_BS for batch in open_data(over(train), rank, 2).train.batches(3)]) for rank in (0, 1)]
    assert whole.shape == (4, 8) and sorted(torch.cat(rows).tolist()) == sorted(whole.tolist())
    pair = [open_data(over(train, "parallel.tensor_parallel_size=2"), rank, 2).train.batches(3) for rank in (0, 1)]
    assert all(one.inputs_BS.equal(other.inputs_BS) for one, other in zip(*pair, strict=True))


def test_context_ranks_read_the_same_and_data_ranks_the_rest(train: str):
    shared = over(train, "parallel.context_parallel_size=2", "parallel.tensor_parallel_size=2")
    rows = [torch.cat([batch.inputs_BS for batch in open_data(shared, rank, 8).train.batches(3)]) for rank in range(8)]
    whole = torch.cat([batch.inputs_BS for batch in open_data(over(train), 0, 1).train.batches(3)])
    assert all(rows[rank].equal(rows[rank // 4 * 4]) for rank in range(8))
    assert sorted([*rows[0].tolist(), *rows[4].tolist()]) == sorted(whole.tolist())


def test_text_that_is_read_too_often_is_named(train: str):
    often = over(train, f"train.steps={round(20 * MAX_EPOCHS)}")
    assert open_data(over(train), 0, 1).remarks(over(train)) == []
    remark = open_data(often, 0, 1).remarks(often)
    assert len(remark) == 1 and remark[0].startswith(f"data.train: '{train}' is read ") and remark[0].endswith("in 80 updates")


def test_padding_and_cut_documents_are_told(tmp_path: Path):
    """Documents of 13, 3 and 4 tokens in rows of 8: one is cut in 8 and 5, and 5 + 3 and 4 are two more rows."""
    documents = [np.full(12, 7), np.full(2, 8), np.full(3, 9)]
    tokens = np.concatenate([np.append(document, 1) for document in documents])
    train = write_corpus(tmp_path / "train", tokens, vocab_size=64, lengths=[13, 3, 4])
    config = over(train, "data.pack=documents", "train.steps=1")
    data = open_data(config, 0, 1)
    told = (
        f"data.train: '{train}' is 3 rows of whole documents, 16.67% of them padding; 1 document is longer than a row and cut"
    )
    assert data.remarks(config) == [told]
    assert open_data(over(train, "train.steps=1"), 0, 1).remarks(over(train, "train.steps=1")) == []


def test_rows_that_do_not_make_up_a_sequence_are_refused_when_its_length_is_known(train: str):
    """A length that is left unset may be that of the checkpoint that is resumed."""
    ramp = build_config({}, ["train.length_ramp=[[3,96]]", f"data.train={train}"])
    with pytest.raises(ValueError, match=r"train\.length_ramp has 96 tokens per row, which does not divide"):
        open_data(ramp, 0, 1)


def test_validation_text_that_is_trained_on_is_named(train: str):
    config = over(train, f"data.validation={train}", "evaluate.tokens=16")
    assert f"data.validation: '{train}' is also trained on, so its loss is not that of unseen text" in (
        open_data(config, 0, 1).remarks(config)
    )


def test_validation_text_of_another_tokenizer_is_refused(train: str, tmp_path: Path):
    other = write_corpus(tmp_path / "other", np.arange(80) % 40 + 2, vocab_size=64, tokenizer="u")
    with pytest.raises(ValueError, match="were made with different tokenizers"):
        open_data(over(train, f"data.validation={other}"), 0, 1)


def test_pieces_without_an_embedding_row_are_refused(train: str):
    with pytest.raises(ValueError, match=r"has 64 pieces, more than model.vocab_size = 48; set model.vocab_size"):
        open_data(over(train, "model.vocab_size=48"), 0, 1)


def test_checked_inputs_are_those_asked_for(train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("launch.runtime.prepare_process", lambda *_: None)  # which would change this process
    asked = over(train, f"run.dir={tmp_path}/run")
    inputs = check_inputs(asked, ALONE)
    assert inputs.asked == inputs.config == asked and inputs.device == torch.device("cpu") and inputs.world is ALONE
    assert not (tmp_path / "run").exists()
    inputs.data.close()
