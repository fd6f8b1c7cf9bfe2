"""Random segmentation with exact probabilities: P(segmentation) is proportional to exp(alpha * sum of log-probabilities).

The sampler of kexue 9811 (the one of 9768 is biased): walking the text once, Z[end] gathers every segmentation of the text
up to `end`, and a new last piece replaces the present one with the share it adds. The draws come from a generator seeded
per document, so a preparation gives the same tokens every time.
"""

import math
import random
from collections.abc import Mapping

import numpy as np

from data.tokenizer import Tokenizer, segments

BYTE_PENALTY = 10.0  # a character spelled in bytes counts this much less than the rarest piece, as in sentencepiece


def sample_segmentation(text: str, scores: Mapping[str, float], alpha: float, draw: random.Random) -> tuple[list[str], float]:
    """One segmentation of `text` into keys of `scores` (log-probabilities), and log Z, the log of the sum over all.

    A character that begins no piece stands alone with the least score less 10. `alpha` > 0.
    """
    assert alpha > 0
    longest = max(map(len, scores))
    lone = min(scores.values()) - BYTE_PENALTY
    total = [0.0] + [-math.inf] * len(text)
    start_of = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            score = scores.get(text[start:end], lone if start == end - 1 else None)
            if score is None:
                continue
            candidate = total[start] + alpha * score
            total[end] = _log_add(total[end], candidate)
            if draw.random() < math.exp(candidate - total[end]):
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
    """Token ids (int32) of a random segmentation of a document. Decodes to the same text as the best segmentation."""
    entries, bytes_ = tokenizer.scores(), tokenizer.byte_ids()
    scores = {piece: score for piece, (_, score) in entries.items()}
    draw = random.Random(seed)
    ids: list[int] = []
    for segment in segments(text):
        for piece in sample_segmentation(segment, scores, alpha, draw)[0] if segment else ():
            ids.extend([entries[piece][0]] if piece in entries else [bytes_[byte] for byte in piece.encode()])
    return np.array(ids, dtype=np.int32)
