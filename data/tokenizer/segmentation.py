"""Random segmentation with exact probabilities: P(segmentation) is proportional to exp(alpha * sum of log-probabilities).

The sampler is that of Su 2023, "Random tokenization revisited: from Viterbi sampling to a perfect sampling algorithm"
(kexue.fm/archives/9811); the one of kexue.fm/archives/9768 is biased. In one pass over the text, Z[end] adds up all
segmentations of the text up to `end`, and a new last piece replaces the present one with the probability of its share of
Z[end]. The generator is seeded per document, so preparing a corpus again gives the same tokens.
"""

import math
import random
from collections.abc import Mapping

import numpy as np

from data.tokenizer.tokenizer import Tokenizer, segments

BYTE_PENALTY = 10.0  # log-probability of a character spelled in bytes, below that of the rarest piece, as in sentencepiece


def sample_segmentation(text: str, scores: Mapping[str, float], alpha: float, rng: random.Random) -> tuple[list[str], float]:
    """One segmentation of `text` into keys of `scores` (log-probabilities), and log Z, the log of the sum over all.

    A character that is not a piece is one by itself, with the lowest score less BYTE_PENALTY. `alpha` > 0.
    """
    assert alpha > 0
    longest = max(map(len, scores))
    unknown = min(scores.values()) - BYTE_PENALTY
    total = [0.0] + [-math.inf] * len(text)
    start_of = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            score = scores.get(text[start:end], unknown if start == end - 1 else None)
            if score is None:
                continue
            candidate = total[start] + alpha * score
            total[end] = _log_add(total[end], candidate)
            if rng.random() < math.exp(candidate - total[end]):
                start_of[end] = start
    pieces, end = [], len(text)
    while end:
        pieces.append(text[start_of[end] : end])
        end = start_of[end]
    return pieces[::-1], total[-1]


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def encode_sampled(tokenizer: Tokenizer, text: str, alpha: float, seed: int) -> np.ndarray:
    """Token ids (int32 [tokens]) of a random segmentation of a document, which decode to the document.

    Raises ValueError for a tokenizer that is not sentencepiece.
    """
    entries, byte_ids = tokenizer.scores(), tokenizer.byte_ids()
    scores = {piece: score for piece, (_, score) in entries.items()}
    rng = random.Random(seed)
    ids: list[int] = []
    for segment in segments(text):
        for piece in sample_segmentation(segment, scores, alpha, rng)[0] if segment else ():
            ids.extend([entries[piece][0]] if piece in entries else [byte_ids[byte] for byte in piece.encode()])
    return np.array(ids, dtype=np.int32)
