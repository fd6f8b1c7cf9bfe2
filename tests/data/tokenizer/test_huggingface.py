"""An exported tokenizer gives the ids of ours, on texts long enough for sums of scores to round."""

import random

import pytest
import tokenizers

from data.tokenizer.huggingface import tokenizer_files
from data.tokenizer.tokenizer import SEGMENT_CHARACTERS, Tokenizer
from data.tokenizer.train import SCORE_GRID, train_tokenizer


def _program(seed: int, lines: int) -> str:
    """Text with much deep indentation: runs of spaces have many segmentations that are nearly or quite as probable."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh_", k=draw.randint(1, 9))) for _ in range(300)]
    return "\n".join(" " * draw.randint(0, 60) + " ".join(draw.choices(words, k=draw.randint(0, 7))) for _ in range(lines))


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(_program(0, 3000))
    ours = train_tokenizer([str(folder / "text.txt")], str(folder / "out"), 550, request.param)
    theirs = tokenizers.Tokenizer.from_buffer(tokenizer_files(ours, 1024)["tokenizer.json"])
    theirs.encode_special_tokens = True
    return ours, theirs


def test_the_ids_are_the_same(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, theirs = pair
    for seed in range(20):
        text = _program(seed, 1000)
        assert len(text) > 2 * SEGMENT_CHARACTERS
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_scores_of_a_unigram_model_lie_on_the_grid(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, _ = pair
    scores = [score for _, score in ours.scores().values()]
    assert all((score * SCORE_GRID).is_integer() for score in scores)
    assert len(set(scores)) > 100
