"""Which validation tokens are scored: each once, the same however the work is shared, at every context."""

from collections import Counter

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus.order import permute, round_keys
from data.corpus.shards import Corpus
from data.corpus.validation import Validation, budget_shares, check_contexts
from tests.shards import write_corpus

SIZE, END = 1000, 1


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A corpus whose token at place p is p + 2: a target says where it is from."""
    return write_corpus(tmp_path_factory.mktemp("text"), np.arange(SIZE) + 2)


def validation(path, S=32, B=4, contexts=None, tokens=0, rank=0, ranks=1, **config) -> Validation:
    return Validation(DataConfig(validation=path, **config), S, B, contexts, tokens, rank, ranks)


def scored(batches) -> list[tuple[int, int]]:
    """(place, tokens before it in its row) of every scored target; what stands before a target must be the text before it."""
    found = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs_BS.tolist(), batch.targets_BS.tolist()):
            for i, target in enumerate(targets):
                if target >= 0:
                    place = target - 2
                    before = [END, *range(2, target)][-(i + 1) :]
                    assert inputs[: i + 1] == before, f"place {place} is predicted from something else"
                    found.append((place, i + 1))
    return found


def places(batches) -> list[int]:
    return [place for place, _ in scored(batches)]


def test_all_of_the_text_is_scored_once(text):
    source = validation(text)
    assert sorted(places(source.whole())) == list(range(SIZE)) and source.tokens == SIZE
    assert all(before == place % 32 + 1 for place, before in scored(source.whole()))


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 500, 999])
def test_a_budget_is_kept_to_the_token(text, tokens):
    source = validation(text, tokens=tokens)
    found = places(source.whole())
    assert len(found) == len(set(found)) == tokens == source.tokens
    assert source.remarks() == []


def test_more_than_there_is_is_read_once_and_said(text):
    source = validation(text, tokens=5000)
    assert sorted(places(source.whole())) == list(range(SIZE))
    assert source.remarks() == ["the validation text allows 1,000 of 5,000 tokens: each is scored once"]


def test_the_text_is_that_of_the_order(text):
    fingerprint = Corpus(text).manifest.fingerprint
    windows = permute(np.arange(-(-SIZE // 32)), -(-SIZE // 32), round_keys("validation", fingerprint))
    wanted = [place for window in windows for place in range(window * 32, min(SIZE, window * 32 + 32))][:300]
    assert places(validation(text, tokens=300).whole()) == wanted
    assert wanted != list(range(300)), "spread over the text"


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 2), (3, 4), (50, 3)])
def test_ranks_and_micro_batches_change_nothing(text, micro, ranks):
    for contexts, read in (
        (None, Validation.whole),
        ([7, 100], lambda source: source.at(7)),
        ([100], lambda source: source.at(100)),
    ):
        alone = sorted(scored(read(validation(text, contexts=contexts, tokens=470))))
        parts = [list(read(validation(text, 32, micro, contexts, 470, rank, ranks))) for rank in range(ranks)]
        assert sorted(pair for part in parts for pair in scored(part)) == alone
        assert len({len(part) for part in parts}) == 1, "as many forward passes on every rank"
        assert len({batch.inputs_BS.shape for part in parts for batch in part}) == 1, "of one shape"
        tokens = parts[0][0].inputs_BS.numel()
        assert tokens <= micro * 32 or parts[0][0].inputs_BS.shape[0] == 1


@pytest.mark.parametrize("contexts", [[64], [64, 256], [64, 128, 512], [2, 3, 999], [1000]])
def test_contexts_score_the_same_tokens_as_many_as_asked_for(text, contexts):
    source = validation(text, contexts=contexts, tokens=400)
    seen = {context: scored(source.at(context)) for context in contexts}
    for context, found in seen.items():
        assert len(found) == 400 == source.context_tokens
        assert {place for place, _ in found} == {place for place, _ in seen[contexts[0]]} and len(dict(found)) == 400
        assert all(context - context // 2 < before <= context for _, before in found)
    rows = sum(int((batch.targets_BS >= 0).any(1).sum()) for batch in source.at(contexts[-1]))
    assert rows == source.rows_at(contexts[-1])
    assert rows * contexts[-1] <= 8 * 400 + 2 * contexts[-1], "the time is bounded by the budget"


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_are_as_many_as_said(text, micro, ranks):
    for rank in range(ranks):
        source = validation(text, B=micro, contexts=[10, 64], tokens=400, rank=rank, ranks=ranks)
        assert [len(list(source.at(context))) for context in (10, 64)] == [source.batches(context) for context in (10, 64)]
        assert len(list(source.whole())) == source.batches()


def test_a_score_does_not_depend_on_the_other_contexts(text):
    alone, beside = validation(text, contexts=[48], tokens=300), validation(text, contexts=[5, 48, 256], tokens=300)
    away = {place for place in places(alone.at(48)) if place < 128}  # too little before them for a context of 256
    shared = [pair for pair in scored(alone.at(48)) if pair[0] not in away]
    assert shared and not set(shared) - set(scored(beside.at(48)))
    ordinary = set(places(validation(text, tokens=300).whole()))
    assert {place for place, _ in shared} <= ordinary, "the same tokens as at the training length"


def test_a_text_too_short_for_a_context(text):
    with pytest.raises(ValueError, match=r"a context of 1,001 tokens is longer than the text at .*, which has 1,000"):
        validation(text, contexts=[64, 1001])
    source = validation(text, contexts=[64, 900], tokens=700)
    assert source.remarks() == [
        "550 tokens of the validation text have enough before them for a context of 900: each is scored once at every context"
    ]
    assert sorted(places(source.at(64))) == list(range(450, 1000))


@pytest.mark.parametrize(("contexts", "said"), [([1], "context of 1 must have"), ([8, 4, 8], "context 8 is given twice")])
def test_contexts_that_no_text_could_score(contexts, said):
    with pytest.raises(ValueError, match=f"evaluate.contexts: .*{said}"):
        check_contexts(contexts, "evaluate.contexts")


def test_a_mixture_shares_the_budget_by_its_weights(text, tmp_path):
    other = write_corpus(tmp_path, np.arange(200) + 5000)
    mixed = [{"path": text, "weight": 3}, {"path": other, "weight": 1}]

    def counts(tokens: int) -> Counter[str]:
        found = Counter()
        for batch in validation(mixed, tokens=tokens).whole():
            targets = batch.targets_BS[batch.targets_BS >= 0]
            found += Counter({"text": int((targets < 5000).sum()), "other": int((targets >= 5000).sum())})
        return found

    assert counts(402) == {"text": 302, "other": 100}
    assert counts(5000) == {"text": 600, "other": 200}, "the shares hold where a corpus is used up"
    assert counts(0) == {"text": 1000, "other": 200}, "all of it, whatever the weights"


def test_shares_are_whole_and_within_the_corpora():
    draw = np.random.default_rng(0)
    for _ in range(200):
        sizes = draw.integers(1, 50, 3).tolist()
        weights, tokens = draw.integers(1, 9, 3).tolist(), int(draw.integers(1, 100))
        found = budget_shares(sizes, weights, tokens)
        assert all(0 <= share <= size for share, size in zip(found, sizes)) and sum(found) <= tokens
        exact = [sum(found) * weight / sum(weights) for weight in weights]
        assert all(abs(share - wanted) < 1 for share, wanted in zip(found, exact))
        full = any((sum(found) + 1) * weight > size * sum(weights) for weight, size in zip(weights, sizes))
        assert sum(found) == tokens or full


def test_documents_bound_the_rows(tmp_path):
    tokens = np.arange(100) + 2
    tokens[[10, 40, 77]] = END
    source = validation(write_corpus(tmp_path, tokens), S=30, B=2, document_mask=True)
    for batch in source.whole():
        starts = {0, 30} | {i for i, token in enumerate(batch.inputs_BS.flatten().tolist()) if token == END}
        assert batch.cu_seqlens.tolist() == [*sorted(starts), 60]


def test_what_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"data\.validation names no corpus"):
        validation("")
    with pytest.raises(ValueError, match="names a corpus twice"):
        validation([{"path": text}] * 2)
    with pytest.raises(FileNotFoundError, match="tiglon prepare"):
        validation(str(tmp_path / "nowhere"))
