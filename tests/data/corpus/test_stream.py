from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig
from data.corpus.plan import read_plan
from data.corpus.shards import Corpus, CorpusManifest, ShardInfo, write_corpus_manifest
from data.corpus.stream import NOT_SCORED, BatchShape, Samples, Stream, document_bounds
from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus_jsonl, tokenizer_directory):
    output = str(tmp_path_factory.mktemp("prepared"))
    prepare([corpus_jsonl], tokenizer_directory, output, PrepareOptions(validation_fraction=0.2), task_bytes=20_000)
    return output


def stream(prepared, part="train", S=32, G=8, B=2, rank=0, ranks=1, seed=3, **config):
    settings = {"train": f"{prepared}/train", "validation": f"{prepared}/validation", **config}
    return Stream(DataConfig(**settings), part, BatchShape(S, G, B), rank, ranks, seed)


def sequences(batches):
    return torch.cat([batch.inputs_BS for batch in batches]), torch.cat([batch.targets_BS for batch in batches])


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_epoch_scores_every_token_once(prepared, part):
    corpus, source = Corpus(f"{prepared}/{part}"), stream(prepared, part, S=37, G=1, B=1)
    tokens = corpus.read(0, corpus.tokens)
    samples = -(-corpus.tokens // 37)
    orders = []
    for epoch in range(2):
        windows = [source.samples.place(np.array([epoch * samples + n]))[2][0] for n in range(samples)]
        assert sorted(windows) == list(range(samples))
        orders.append(windows)
        seen = np.concatenate([sequences(source.batches(epoch * samples + n))[1][0].numpy() for n in np.argsort(windows)])
        assert np.array_equal(seen[: corpus.tokens], tokens)
        assert np.all(seen[corpus.tokens :] == NOT_SCORED)
    assert orders[0] != orders[1], "every epoch has an order of its own"


def test_inputs_are_the_tokens_before_the_targets(prepared):
    for step in range(20):
        inputs, targets = sequences(stream(prepared).batches(step))
        assert inputs.dtype == targets.dtype == torch.int64
        scored = targets[:, :-1] != NOT_SCORED
        assert torch.equal(inputs[:, 1:][scored], targets[:, :-1][scored])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(1, 1), (1, 8), (2, 4), (4, 1), (8, 1)]), st.integers(0, 10**9))
def test_ranks_and_micro_batches_change_nothing(prepared, layout, step):
    ranks, micro = layout
    whole = sequences(stream(prepared, prefetch_steps=0).batches(step))
    parts = [stream(prepared, B=micro, rank=r, ranks=ranks, prefetch_steps=0).batches(step) for r in range(ranks)]
    joined = sequences([batch for part in parts for batch in part])
    assert torch.equal(whole[0], joined[0]) and torch.equal(whole[1], joined[1])
    assert all(batch.inputs_BS.shape == (micro, 32) for part in parts for batch in part)


def test_reading_ahead_changes_nothing(prepared):
    ahead, plain = stream(prepared, prefetch_steps=3), stream(prepared, prefetch_steps=0)
    for step in [0, 1, 2, 7, 8, 3, 3, 10**6]:
        assert torch.equal(sequences(ahead.batches(step))[0], sequences(plain.batches(step))[0])
        assert len(ahead._ahead) == 3
    ahead.close()


def test_fingerprint_names_the_order(prepared):
    base = stream(prepared).fingerprint
    assert base == stream(prepared, B=4).fingerprint == stream(prepared, rank=1, ranks=2).fingerprint
    assert base == stream(prepared, prefetch_steps=0, document_mask=True).fingerprint
    others = [stream(prepared, seed=4), stream(prepared, S=16), stream(prepared, "validation"), stream(prepared, G=16)]
    assert len({base, *(other.fingerprint for other in others)}) == 5


def test_mixture_and_curriculum_follow_their_weights(prepared, tokenizer_directory):
    train, held_out = f"{prepared}/train", f"{prepared}/validation"
    mixed = [{"path": train, "weight": 3}, {"path": held_out, "weight": 1}]
    source = stream(prepared, train=mixed, curriculum=[{"from_step": 5, "sources": [{"path": held_out}]}])
    corpus, epoch, window = source.samples.place(np.arange(8 * 8))
    assert np.bincount(corpus[:40]).tolist() == [30, 10]
    assert np.all(corpus[40:] == 1)
    mine = [(e, w) for c, e, w in zip(corpus, epoch, window) if c == 1]
    assert len(set(mine)) == 34, "a phase continues where the source was left"


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 50])
def test_epochs_are_what_a_run_has_drawn(prepared, steps):
    """Counted sample by sample, before, at and after the step at which the mixture changes."""
    train, held_out = f"{prepared}/train", f"{prepared}/validation"
    mixed = [{"path": train, "weight": 3}, {"path": held_out, "weight": 1}]
    source = stream(prepared, train=mixed, curriculum=[{"from_step": 5, "sources": [{"path": held_out}]}])
    corpus, _, _ = source.samples.place(np.arange(steps * 8))
    counts = np.bincount(corpus, minlength=2)
    sizes = [-(-Corpus(path).tokens // 32) for path in (train, held_out)]
    assert source.epochs(steps) == [(train, counts[0] / sizes[0]), (held_out, counts[1] / sizes[1])]


def test_a_corpus_read_once_and_a_half(prepared):
    source = stream(prepared, S=37, G=1, B=1)
    size = source.samples.sizes[0]
    assert source.epochs(size) == [(f"{prepared}/train", 1.0)]
    assert source.epochs(size + size // 2)[0][1] == pytest.approx(1.5, abs=1 / size)


def test_document_bounds_begin_at_separators(prepared):
    inputs = np.array([[5, 6, 1, 7], [1, 8, 9, 1]])
    assert document_bounds(inputs, 1).tolist() == [0, 2, 4, 7, 8]
    batch = stream(prepared, document_mask=True).batches(0)[0]
    bounds = batch.cu_seqlens
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == batch.inputs_BS.numel()
    assert {0, 32, 64} <= set(bounds.tolist())
    assert stream(prepared).batches(0)[0].cu_seqlens is None


def test_what_is_refused(prepared, tmp_path, corpus_jsonl):
    with pytest.raises(FileNotFoundError, match="tiglon prepare"):
        stream(prepared, train=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="did you mean"):
        stream(prepared, train=prepared)
    with pytest.raises(ValueError, match=r"data\.train names no corpus"):
        stream(prepared, train="")
    with pytest.raises(ValueError, match="names a corpus twice"):
        stream(prepared, train=[{"path": f"{prepared}/train"}] * 2)
    with pytest.raises(ValueError, match="not a multiple"):
        stream(prepared, G=6, ranks=4)
    with pytest.raises(ValueError, match="= 6 is not a multiple"):
        ramped(prepared, 5)
    train_tokenizer([corpus_jsonl], str(tmp_path / "other"), vocab_size=350)
    with pytest.raises(ValueError, match="same tokenizer"):
        stream(prepared, tokenizer=str(tmp_path / "other"))


def ramped(prepared, first_batch):
    """Sizes 3, 3, 3, 3, 3, 6 and then 8, of which the second rank of two reads four at a time."""
    config = DataConfig(train=f"{prepared}/train", prefetch_steps=0)
    return Stream(config, "train", BatchShape(32, 8, 4, ((5, 3), (6, 6)), first_batch), 1, 2, 3)


def test_batches_of_the_past_may_have_had_any_size(prepared):
    alone, part = stream(prepared, G=1, B=1, prefetch_steps=0), ramped(prepared, 6)
    firsts = [5 * 3 + 6 + 8 * n for n in range(3)]
    for number, first in enumerate(firsts, 6):
        expected = torch.cat([alone.batches(sample)[0].inputs_BS for sample in range(first + 4, first + 8)])
        assert torch.equal(sequences(part.batches(number))[0], expected)


def test_ten_trillion_tokens_need_no_index(tmp_path):
    shards = [ShardInfo(f"{n}", 5 * 10**9, 1, 10**10 + 64, 64, str(n)) for n in range(2000)]
    write_corpus_manifest(str(tmp_path), CorpusManifest("t", 400, 1, "uint16", shards).sealed())
    samples = Samples([(0, [SourceConfig(path=str(tmp_path))])], 4096, 0)
    assert samples.corpora[0].tokens == 10**13
    epoch_samples = -(-(10**13) // 4096)
    index = np.array([0, 1, epoch_samples - 1, epoch_samples, 10**12])
    _, epoch, window = samples.place(index)
    assert epoch.tolist() == [0, 0, 0, 1, 10**12 // epoch_samples]
    assert window.min() >= 0 and window.max() < epoch_samples and len(set(window.tolist())) == 5


def shard_documents(prepared, part="train"):
    """The documents as Arrow reads them, in order."""
    files = sorted(Path(f"{prepared}/{part}").glob("*.arrow"))
    columns = [pa.ipc.open_file(str(file)).read_all()["tokens"].to_pylist() for file in files]
    assert len(columns) > 2
    return [document for column in columns for document in column]


@pytest.mark.parametrize("S", [16, 100, 1024])
def test_rows_of_whole_documents_hold_each_document_once_an_epoch(prepared, S):
    """The rows are taken apart and the documents of the shards put together again, without what the packing says."""
    documents = shard_documents(prepared)
    assert min(map(len, documents)) < S < sum(map(len, documents))
    wanted = Counter(
        tuple(document[first : first + S]) for document in documents for first in range(0, len(document), S)
    )  # of a longer document, pieces of a whole row and the rest
    source = stream(prepared, S=S, G=1, B=1, pack="documents", document_mask=True)
    rows, orders = source.samples.sizes[0], []
    for epoch in range(2):
        seen, empty, order = Counter(), 0, []
        for n in range(rows):
            (batch,) = source.batches(epoch * rows + n)
            inputs, targets = batch.inputs_BS[0].tolist(), batch.targets_BS[0].tolist()
            scored = S - targets.count(NOT_SCORED)
            assert targets[scored:] == [NOT_SCORED] * (S - scored) and inputs[scored:] == [1] * (S - scored)
            assert inputs[1:scored] == targets[: scored - 1], "each target is the next input"
            ends = [n + 1 for n in range(scored) if targets[n] == 1 or n + 1 == scored]
            pieces = [tuple(targets[start:stop]) for start, stop in pairwise([0, *ends])]
            if targets[scored - 1] != 1 and len(pieces) > 1:
                raise AssertionError("only a piece of a whole row ends without a separator")
            seen.update(pieces)
            bounds = [0, *ends] if scored == S else [0, *ends, S]
            assert batch.cu_seqlens.tolist() == bounds, "documents begin at their separator, and padding is one"
            order.append(pieces[0])
            empty += S - scored
        assert seen == wanted
        assert source.samples.padding(0) == pytest.approx(empty / (rows * S))
        orders.append(order)
    assert orders[0] != orders[1], "every epoch has an order of its own"
    assert rows <= 1.1 * sum(map(len, documents)) / S + 1, "padding is small"


def test_the_first_input_of_a_row_is_the_token_before_its_first(prepared):
    tokens = [token for document in shard_documents(prepared) for token in document]
    source = stream(prepared, S=16, G=1, B=1, pack="documents")
    begun_inside = 0
    for n in range(source.samples.sizes[0]):
        _, _, window = source.samples.place(np.array([n]))
        start, _ = source.samples.packings[0].pieces(int(window[0]))[0]
        first = source.batches(n)[0].inputs_BS[0, 0].item()
        assert first == (tokens[start - 1] if start else 1)
        begun_inside += first != 1
    assert begun_inside > 10


@pytest.mark.parametrize("config", [{"pack": "documents"}, {"pack": "documents", "document_mask": True}])
def test_rows_of_whole_documents_are_alike_on_all_ranks_and_in_any_order(prepared, config):
    mixed = [{"path": f"{prepared}/train", "weight": 2}, {"path": f"{prepared}/validation", "weight": 1}]
    config |= {"train": mixed, "curriculum": [{"from_step": 4, "sources": [{"path": f"{prepared}/validation"}]}]}
    whole = {n: sequences(stream(prepared, prefetch_steps=0, **config).batches(n)) for n in (7, 3, 0, 4)}
    for n, (inputs, targets) in whole.items():
        parts = [stream(prepared, B=1, rank=r, ranks=4, prefetch_steps=2, **config).batches(n) for r in range(4)]
        joined = sequences([batch for part in parts for batch in part])
        assert torch.equal(joined[0], inputs) and torch.equal(joined[1], targets)
    source = stream(prepared, **config)
    corpus, epoch, window = source.samples.place(np.arange(4 * 8 + 40 * 8))
    for c in (0, 1):
        placed = list(zip(epoch[corpus == c], window[corpus == c]))
        assert len(set(placed)) == len(placed), "the mixture and the phase after it read no row twice in an epoch"


def test_packing_is_another_order_and_another_plan(prepared):
    plain, packed = stream(prepared), stream(prepared, pack="documents")
    assert plain.fingerprint != packed.fingerprint
    assert packed.plan().other_past(plain.plan(), 0) == "data.pack was stream and is documents"
    before = {key: value for key, value in plain.plan().record().items() if key not in ("pack", "length_ramp")}
    assert read_plan(before) == plain.plan(), "a checkpoint without the key is of a stream"


def shortened(prepared, length_ramp, sizes=((3, 4),), rank=0, ranks=1, **config):
    settings = DataConfig(**{"train": f"{prepared}/train", "prefetch_steps": 0, **config})
    return Stream(settings, "train", BatchShape(32, 8, 2, sizes, length_ramp=length_ramp), rank, ranks, 3)


def test_shorter_rows_are_those_of_whole_sequences_cut(prepared):
    """With the sizes of batches growing beside: the same tokens are read, in the same order."""
    short, plain = shortened(prepared, ((2, 8), (5, 16))), shortened(prepared, ())
    for batch, length in ((0, 8), (1, 8), (2, 16), (3, 16), (4, 16), (5, 32), (9, 32)):
        assert short.tokens(batch) == plain.tokens(batch)
        for one, other in zip(short.batches(batch), plain.batches(batch), strict=True):
            assert one.inputs_BS.shape == one.targets_BS.shape == (2 * 32 // length, length)
            assert torch.equal(one.inputs_BS.flatten(), other.inputs_BS.flatten())
            assert torch.equal(one.targets_BS.flatten(), other.targets_BS.flatten())


def test_every_shorter_row_begins_a_document(prepared):
    for batch in shortened(prepared, ((2, 8),), document_mask=True).batches(1):
        wanted = {*range(0, 65, 8), *np.flatnonzero(batch.inputs_BS.flatten() == 1).tolist()}
        assert set(batch.cu_seqlens.tolist()) == wanted


def test_ranks_share_shorter_rows(prepared):
    whole = sequences(shortened(prepared, ((9, 16),)).batches(4))
    parts = [shortened(prepared, ((9, 16),), rank=r, ranks=2).batches(4) for r in range(2)]
    joined = sequences([batch for part in parts for batch in part])
    assert torch.equal(whole[0], joined[0]) and torch.equal(whole[1], joined[1])


def test_the_lengths_so_far_belong_to_the_past(prepared):
    before = shortened(prepared, ((2, 8), (5, 16))).plan()
    later = [((2, 8), (5, 16)), ((2, 8), (4, 16)), ((2, 8), (4, 16), (9, 8))]
    assert [shortened(prepared, ramp).plan().other_past(before, 4) for ramp in later] == [""] * 3
    assert "so far had 8 until batch 2, then 16 tokens and have 32 (train.length_ramp = [[2, 8], [4, 16]] keeps" in shortened(
        prepared, ()
    ).plan().other_past(before, 4)
    assert shortened(prepared, ()).plan().other_past(before, 0) == ""
    assert "have 8 until batch 2, then 16 (train.length_ramp = [] keeps" in before.other_past(shortened(prepared, ()).plan(), 4)
