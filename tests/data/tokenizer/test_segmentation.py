import math
import random
from collections import Counter

import pytest

from data.corpus.shards import read_corpus_manifest
from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.segmentation import encode_sampled, sample_segmentation
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.train import train_tokenizer

SCORES = {"a": -1, "b": -1.5, "ab": -1.2, "ba": -2, "aba": -2.5}
SEGMENTATIONS = ["ab ab", "a b ab", "ab a b", "aba b", "a ba b", "a b a b"]


@pytest.mark.parametrize(
    ("alpha", "wanted", "log_total"),
    [
        (1.0, [0.5145, 0.1402, 0.1402, 0.1039, 0.0630, 0.0382], -1.735412),
        (0.5, [0.3209, 0.1675, 0.1675, 0.1442, 0.1123, 0.0875], -0.063485),
    ],
)
def test_probabilities_are_exact(alpha, wanted, log_total):
    """Oracle: enumeration of all segmentations (kexue.fm/archives/9811)."""
    draw, draws = random.Random(0), 20_000
    found = Counter()
    for _ in range(draws):
        pieces, total = sample_segmentation("abab", SCORES, alpha, draw)
        assert math.isclose(total, log_total, abs_tol=1e-6)
        found[" ".join(pieces)] += 1
    assert sorted(found) == sorted(SEGMENTATIONS)
    for segmentation, share in zip(SEGMENTATIONS, wanted):
        assert abs(found[segmentation] / draws - share) < 4 * math.sqrt(share / draws) + 1e-4


def test_three_equal_ways_are_a_third_each():
    draw, scores = random.Random(0), dict.fromkeys(["watch", "ing", "wat", "ching", "w", "atching"], -1.0)
    found = Counter(tuple(sample_segmentation("watching", scores, 1.0, draw)[0]) for _ in range(20_000))
    assert len(found) == 3
    assert all(abs(count / 20_000 - 1 / 3) < 0.015 for count in found.values())


def test_sampled_tokens_are_the_same_text_and_seeded(tokenizer_directory, documents):
    tokenizer = Tokenizer.load(tokenizer_directory)
    text = documents[0] + "\u2581 \x00 ☃"
    drawn = [encode_sampled(tokenizer, text, 0.2, seed) for seed in range(3)]
    assert all(tokenizer.decode(ids) == text for ids in drawn)
    assert drawn[0].tolist() == encode_sampled(tokenizer, text, 0.2, 0).tolist() != drawn[1].tolist()
    assert encode_sampled(tokenizer, "", 0.2, 0).tolist() == []
    best = tokenizer.encode(text)
    sharp = encode_sampled(tokenizer, text, 500.0, 0)
    scores = tokenizer.backend.pieces.get_score
    assert math.isclose(sum(map(scores, best)), sum(map(scores, sharp.tolist())), rel_tol=1e-6)


def test_preparing_with_sampling_is_repeatable(tmp_path, corpus_jsonl, documents, tokenizer_directory):
    (tmp_path / "x.txt").write_text("\n".join(documents[:3]))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(
            [str(tmp_path / "x.txt")],
            tokenizer_directory,
            str(tmp_path / name),
            PrepareOptions(validation_fraction=0, sampling_alpha=0.3, seed=seed),
            workers=1,
        )
    prints = [read_corpus_manifest(str(tmp_path / name / "train")).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    train_tokenizer([corpus_jsonl], str(tmp_path / "bpe"), 400, model="bpe")
    with pytest.raises(ValueError, match="unigram"):
        prepare([corpus_jsonl], str(tmp_path / "bpe"), str(tmp_path / "d"), PrepareOptions(sampling_alpha=0.3))
