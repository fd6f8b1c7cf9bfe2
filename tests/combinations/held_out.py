"""The losses of the held-out text by their definition: every target once, at the training length and at each context."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from data.corpus.shards import Corpus
from tests.combinations.network import Batch, Weights, token_losses

WINDOWS_IN_A_CONTEXT = 8
"""Windows are longer than the training length where a context is more than so many of them."""

Span = tuple[int, int, int]
"""First target of a row, and the targets [start, stop) that are scored."""


def losses(config: Any, weights: Weights) -> dict[str, float]:
    """Mean loss in nats per token, of the text and at each context."""
    (source,) = config.data.sources("validation")
    corpus = Corpus(source.path)
    tokens = torch.from_numpy(corpus.read(0, corpus.tokens).astype("int64"))
    end_of_text = corpus.manifest.end_of_text
    corpus.close()
    S, longest, count = config.train.sequence_length, max(config.evaluate.contexts or [0]), len(tokens)
    whole = [(first, first, min(first + S, count)) for first in range(0, count, S)]
    found = {"held-out loss": _mean(config, weights, tokens, end_of_text, whole, S)}
    for context in config.evaluate.contexts:
        spans = list(_spans(context, max(S, longest // WINDOWS_IN_A_CONTEXT), longest, count))
        found[f"held-out loss in context {context}"] = _mean(config, weights, tokens, end_of_text, spans, context)
    return found


def _spans(context: int, window: int, longest: int, count: int) -> Iterator[Span]:
    """Rows that score half a context at most; the first tokens have too few before them for the longest context."""
    for first in range(0, count, window):
        stop = min(first + window, count)
        for start in range(max(first, longest - longest // 2), stop, context // 2):
            end = min(start + context // 2, stop)
            yield max(0, end - context), start, end


def _mean(config: Any, weights: Weights, tokens: Tensor, end_of_text: int, spans: Sequence[Span], length: int) -> float:
    total, scored = 0.0, 0
    for part in (spans[i : i + 32] for i in range(0, len(spans), 32)):
        losses = token_losses(config, weights, _batch(config, tokens, end_of_text, part, length), config.evaluate.position)
        total += losses.double().sum().item()
        scored += sum(stop - start for _, start, stop in part)
    return total / scored


def _batch(config: Any, tokens: Tensor, end_of_text: int, spans: Sequence[Span], length: int) -> Batch:
    padded = torch.cat((torch.tensor([end_of_text]), tokens, torch.ones(length, dtype=torch.long)))  # [i] is before target i
    inputs = torch.stack([padded[first : first + length] for first, _, _ in spans])
    targets = torch.full_like(inputs, -100)
    for row, (first, start, stop) in enumerate(spans):
        targets[row, start - first : stop - first] = tokens[start:stop]
    starts = inputs == end_of_text
    starts[:, 0] = True
    bounds = torch.cat((starts.flatten().nonzero()[:, 0], torch.tensor([inputs.numel()])))
    return inputs, targets, bounds.int() if config.data.document_mask else None
