"""Held-out loss: that of a plain loop over the text, however it is cut and shared, with its standard error."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from data.config import DataConfig
from data.corpus.validation import Validation
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import initialise
from model.parallel.layers import serial_kit
from model.parallel.mesh import Mesh, make_mesh
from model.positions.config import PositionConfig
from tests.ranks import run_ranks
from tests.shards import write_corpus
from trainer.evaluate import evaluate, evaluate_context

SIZE, S = 210, 16
CONTEXTS = [6, 24, 40]


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 40, SIZE)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("text"), tokens(), 40)


def make(dtype=torch.float32) -> Decoder:
    config = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    decoder = Decoder(config, PositionConfig(), S, serial_kit(dtype))
    initialise(decoder, 0)
    return decoder


def validation(
    text: str, micro: int = 4, rank: int = 0, ranks: int = 1, budget: int = 0, documents: bool = False
) -> Validation:
    return Validation(DataConfig(validation=text, document_mask=documents), S, micro, CONTEXTS, budget, rank, ranks)


def mean_loss(decoder: Decoder, scored: list[tuple[int, int]]) -> float:
    """Mean of -log p of the tokens at given places, each after a sequence of its own of so many tokens, from the logits."""
    whole, total = torch.tensor([1, *tokens()]), 0.0
    for before in {before for _, before in scored}:
        ends = [place + 1 for place, length in scored if length == before]
        inputs = torch.stack([whole[end - before : end] for end in ends])
        with torch.no_grad():
            total += float(cross_entropy(decoder(inputs)[:, -1], whole[ends], reduction="sum"))
    return total / len(scored)


@dataclass
class Plain:
    """The loss that a plain loop finds, at the training length and at each context."""

    whole: float
    contexts: dict[int, float]


@pytest.fixture(scope="module")
def plain() -> Plain:
    decoder = make(torch.float64)
    whole = mean_loss(decoder, [(place, place % S + 1) for place in range(SIZE)])
    first, contexts = max(CONTEXTS) - max(CONTEXTS) // 2, {}
    for context in CONTEXTS:
        half, length = context // 2, max(S, max(CONTEXTS) // 8)
        scored = []
        for window in range(0, SIZE, length):
            start, stop = max(window, first), min(window + length, SIZE)
            for row in range(start, stop, half):
                end = min(row + half, stop)
                scored += [(place, place + 1 - max(0, end - context)) for place in range(row, end)]
        assert len(scored) == SIZE - first
        contexts[context] = mean_loss(decoder, scored)
    return Plain(whole, contexts)


@pytest.mark.parametrize("micro", [1, 3, 4, 50])
def test_the_loss_is_that_of_a_plain_loop_whatever_the_micro_batch(text: str, plain: Plain, micro: int):
    source, decoder = validation(text, micro), make()
    score = evaluate(decoder, source.whole(), Mesh())
    assert (score.tokens, score.context) == (SIZE, S)
    assert score.loss == pytest.approx(plain.whole, rel=1e-6)
    for context in CONTEXTS:
        score = evaluate_context(decoder, source.at(context), Mesh())
        assert (score.tokens, score.context) == (SIZE - 20, context)
        assert score.loss == pytest.approx(plain.contexts[context], rel=1e-6)


@pytest.mark.parametrize("chunk", [7, 20, 39])
@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_is_the_same_in_chunks(text: str, plain: Plain, chunk: int, documents: bool):
    source, decoder, beats = validation(text, documents=documents), make(), []
    for context in CONTEXTS:
        beats.clear()
        score = evaluate_context(decoder, source.at(context), Mesh(), None, lambda: beats.append(0), chunk)
        assert len(beats) == -(-context // chunk) * len(list(source.at(context)))
        one = evaluate_context(decoder, source.at(context), Mesh())
        assert (score.tokens, score.context) == (one.tokens, one.context) == (SIZE - 20, context)
        assert score.loss == pytest.approx(one.loss, rel=1e-6)
        assert score.standard_error == pytest.approx(one.standard_error, rel=1e-5)
        assert documents or score.loss == pytest.approx(plain.contexts[context], rel=1e-6)


def test_bf16_in_chunks_is_as_good_as_in_one_forward(text: str, plain: Plain):
    for context in CONTEXTS[1:]:
        losses = [
            evaluate_context(make(torch.bfloat16), validation(text).at(context), Mesh(), chunk_tokens=chunk).loss
            for chunk in (0, 9, 16)
        ]
        assert losses == pytest.approx([plain.contexts[context]] * 3, rel=2e-3)


def on_two_ranks(rank: int, world_size: int, text: str) -> list[tuple[float, int, int]]:
    mesh, source, beats = make_mesh(1, torch.device("cpu")), validation(text, 4, rank, world_size), []
    found = [evaluate(make(), source.whole(), mesh, beat=lambda: beats.append(0))]
    found += [evaluate_context(make(), source.at(context), mesh) for context in CONTEXTS]
    return [(score.loss, score.tokens, len(beats)) for score in found]


def test_the_loss_does_not_depend_on_the_number_of_ranks(text: str, plain: Plain):
    for rank in run_ranks(on_two_ranks, 2, text):
        wanted = [plain.whole, *plain.contexts.values()]
        assert [loss for loss, _, _ in rank] == pytest.approx(wanted, rel=1e-6)
        assert [count for _, count, _ in rank] == [SIZE, *[SIZE - 20] * 3]
        assert rank[0][2] == 2, "14 windows, 4 in a micro-batch on 2 ranks: 2 batches on each"


@dataclass
class Rows:
    """A micro-batch of given targets."""

    targets_BS: torch.Tensor
    cu_seqlens: None = None

    @property
    def inputs_BS(self) -> torch.Tensor:  # noqa: N802
        return self.targets_BS.clamp(min=0)


def test_the_standard_error_is_that_of_the_mean_over_rows():
    decoder, targets = make(torch.float64), torch.randint(0, 40, (12, S), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss_BS = cross_entropy(decoder(targets).transpose(1, 2), targets, reduction="none").numpy()
    score = evaluate(decoder, [Rows(targets[:5]), Rows(targets[5:])], Mesh())
    assert score.standard_error == pytest.approx(np.std(loss_BS.mean(1), ddof=1) / np.sqrt(12), rel=1e-9)
    unequal, counts = targets.clone(), np.arange(12) + 3
    for row, count in enumerate(counts):
        unequal[row, count:] = -100
    filled = Rows(torch.full((4, S), -100))
    score = evaluate(decoder, [Rows(unequal), filled], Mesh())
    sums = np.array([loss_BS[row, :count].sum() for row, count in enumerate(counts)])
    assert score.loss == pytest.approx(sums.sum() / counts.sum(), rel=1e-9)
    away = sums - score.loss * counts
    assert score.standard_error == pytest.approx(np.sqrt(12 / 11 * (away**2).sum()) / counts.sum(), rel=1e-9)
    one = evaluate(decoder, [Rows(targets[:1]), filled], Mesh())
    assert one.standard_error is None and "standard_error" not in one.record(3, "validation")


def test_the_standard_error_foretells_how_far_other_texts_lie():
    """Of 40 draws of 12 rows, about two thirds lie within one standard error of the mean of all."""
    targets = torch.randint(0, 40, (480, S), generator=torch.Generator().manual_seed(2))
    decoder = make()
    found = [evaluate(decoder, [Rows(part)], Mesh()) for part in targets.chunk(40)]
    mean = np.mean([score.loss for score in found])
    within = np.mean([abs(score.loss - mean) < (score.standard_error or 0) for score in found])
    assert 0.5 < within < 0.85


def test_another_map_counts_beyond_its_window_only(text: str):
    decoder, source, rerope = make(), validation(text), PositionConfig(kind="rerope", window=6)
    for context, same in ((6, True), (40, False)):
        own, other = (evaluate_context(decoder, source.at(context), Mesh(), how).loss for how in (None, rerope))
        assert (own == other) is same


def test_tokens_are_whole_at_contexts_but_not_at_the_training_length(text: str):
    decoder, source, seen = make(), validation(text), []

    @contextmanager
    def tokens_whole():
        seen.append("begin")
        yield
        seen.append("end")

    decoder.kit.tokens_whole = tokens_whole  # type: ignore[method-assign]
    evaluate(decoder, source.whole(), Mesh())
    assert seen == []
    evaluate_context(decoder, source.at(24), Mesh())
    assert seen == ["begin", "end"]


def test_nothing_to_score_is_one_sentence():
    with pytest.raises(ValueError, match="no token to score"):
        evaluate(make(), [], Mesh())


def test_batches_are_read_one_after_another(text: str):
    """Not all of them before the first is scored."""
    read, scored = [], []

    def watched():
        for batch in validation(text, 1).whole():
            read.append(0)
            assert len(read) == len(scored) + 1
            yield batch

    evaluate(make(), watched(), Mesh(), beat=lambda: scored.append(0))
    assert len(scored) == -(-SIZE // S)
