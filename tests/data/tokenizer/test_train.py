import pytest

from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.train import LARGEST_VOCABULARY, MOST_THREADS, SCORE_GRID, TokenizerBudget, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return Tokenizer.load(tokenizer_directory)


def test_no_piece_spans_a_newline_and_digits_stand_apart(tokenizer):
    pieces = [tokenizer.backend.pieces.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    assert [piece for piece in pieces if "\n" in piece] == ["\n"]
    assert all(len(piece) == 1 for piece in pieces if any(sign.isdigit() for sign in piece) and not piece.startswith("<0x"))


def test_training_is_repeatable(tmp_path, corpus_jsonl, tokenizer):
    again = train_tokenizer([corpus_jsonl], str(tmp_path), vocab_size=400)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == 400


def test_what_is_refused(tmp_path, corpus_jsonl):
    with pytest.raises(ValueError, match="give more text"):
        train_tokenizer([corpus_jsonl], str(tmp_path), vocab_size=60_000)
    with pytest.raises(ValueError, match="at least 300"):
        train_tokenizer([corpus_jsonl], str(tmp_path), vocab_size=30)
    for size in (0, -1, LARGEST_VOCABULARY + 1, 10**30):
        with pytest.raises(ValueError, match=f"vocab_size = {size}: use at least 300, .* at most 16,777,216"):
            train_tokenizer(["nowhere"], str(tmp_path), vocab_size=size)
    for threads in (0, -3, MOST_THREADS + 1, 10**30):
        with pytest.raises(ValueError, match=f"threads = {threads}: give 1 to 1,024"):
            train_tokenizer(["nowhere"], str(tmp_path), 400, budget=TokenizerBudget(threads=threads))
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"sample_bytes = {size}: give at least"):
            train_tokenizer(["nowhere"], str(tmp_path), 400, budget=TokenizerBudget(size))
    with pytest.raises(ValueError, match="unigram"):
        train_tokenizer([corpus_jsonl], str(tmp_path), vocab_size=400, model="word")
    with pytest.raises(FileNotFoundError):
        train_tokenizer([str(tmp_path / "nowhere.txt")], str(tmp_path), vocab_size=400)


def test_scores_lie_on_the_grid_and_a_small_sample_is_the_same_each_time(tmp_path, corpus_jsonl, tokenizer):
    scores = [score for _, score in tokenizer.scores().values()]
    assert len(scores) > 100 and all(score * SCORE_GRID == round(score * SCORE_GRID) for score in scores)
    small = TokenizerBudget(20_000)
    made = [train_tokenizer([corpus_jsonl], str(tmp_path / f"{n}"), 320, "bpe", budget=small) for n in range(2)]
    assert made[0].fingerprint == made[1].fingerprint


def test_a_text_too_short_for_its_vocabulary_is_told_how_much_it_needs(tmp_path, corpus_jsonl):
    with pytest.raises(
        ValueError, match=r"vocab_size = 60,000, but the [\d,]+ characters .* at most [\d,]+ pieces: give more text"
    ):
        train_tokenizer([corpus_jsonl], str(tmp_path), vocab_size=60_000)


@pytest.mark.parametrize("held", ["tokenizer.model", "tiglon_tokenizer.json"])
def test_an_output_with_a_tokenizer_is_refused_before_anything_is_read(tmp_path, held):
    (tmp_path / held).write_text("of another")
    with pytest.raises(ValueError, match=f"holds another {held}, which would be replaced: choose another --output"):
        train_tokenizer(["nowhere"], str(tmp_path), 400)
    assert (tmp_path / held).read_text() == "of another"


@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
def test_an_output_that_is_a_file_is_refused_before_anything_is_read(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*/file'"):
        train_tokenizer(["nowhere"], f"{tmp_path}/file{below}", 400)


@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, below):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}'"):
        train_tokenizer(["nowhere"], f"{tmp_path}{below}", 400)
