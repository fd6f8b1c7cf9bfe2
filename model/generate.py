"""Generation: sampling one token at a time with a cache, for several prompts of unequal length at once."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.kv_cache import KVCache
from model.decoder import Decoder
from model.positions.config import PositionConfig

MIN_TEMPERATURE = 1e-6
"""Logits divided by less could be infinite in float32, and their probabilities NaN."""


@dataclass(frozen=True)
class Sampling:
    """Rules by which the next token is chosen.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (nucleus); 1 = all."""
    seed: int = 0
    """Row r of a batch draws from seed + r, so that its text does not depend on the other rows."""
    never: tuple[int, ...] = ()
    """Ids that are not chosen: those inside a vocabulary that no token has."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature} must be 0 (greedy) or a finite number from {MIN_TEMPERATURE:g} on"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")
        if not -(1 << 62) <= self.seed < 1 << 62:
            raise ValueError(f"seed = {self.seed} must lie between -2**62 and 2**62")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Distribution that tokens are drawn from, float32 [B, V]: temperature, then top-k, then top-p of what is left."""
    logits = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    p = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        p = p.masked_fill((before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p), 0.0)
    return p / p.sum(dim=-1, keepdim=True)


def sample_tokens(logits_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """One token for each row, int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    p = probabilities(logits_BV, sampling).cpu()
    drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(p, generators, strict=True)]
    return torch.cat(drawn).to(logits_BV.device)


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    new_tokens: int,
    sampling: Sampling | None = None,
    stop: Container[int] = (),
    position: PositionConfig | None = None,
    vocabulary: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts. Yields the next token of every row as it is chosen, None for rows that have ended.

    Args:
        decoder: the network; under tensor parallelism every rank of the group calls with the same arguments.
        prompts: token ids of each row, at least one.
        new_tokens: largest number of tokens to add to each.
        sampling: rules of choice; default greedy.
        stop: the tokens that end a row (they are yielded).
        position: the map to decode with; default the decoder's own.
        vocabulary: ids below it may be chosen; default all. An embedding padded beyond its tokenizer has rows without a token.

    Raises:
        ValueError: no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt has no tokens; give each at least one (the end-of-text token begins a document)")
    sampling = sampling or Sampling()
    tokens_BS, cache = _left_padded(decoder, prompts, new_tokens, position or decoder.position)
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))]
    ended = [False] * len(prompts)
    for _ in range(new_tokens):
        with decoder.kit.sequences_whole(), torch.compiler.set_stance("force_eager"):  # every step has another shape
            logits_BV = decoder(tokens_BS, cache=cache)[:, -1, :vocabulary]
        logits_BV[:, list(sampling.never)] = float("-inf")
        chosen_B = sample_tokens(logits_BV, sampling, generators)
        chosen = chosen_B.tolist()
        yield [None if over else token for token, over in zip(chosen, ended, strict=True)]
        ended = [over or token in stop for token, over in zip(chosen, ended, strict=True)]
        if all(ended):
            return
        tokens_BS = chosen_B[:, None]


def _left_padded(
    decoder: Decoder, prompts: list[list[int]], new_tokens: int, position: PositionConfig
) -> tuple[Tensor, KVCache]:
    """Prompts padded on the left to one length, int64 [B, S], and an empty cache for them and `new_tokens` more."""
    device, longest = decoder.device, max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    starts_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache = KVCache(
        decoder.config, position, decoder.trained_length, len(prompts), longest + new_tokens,
        starts_B if starts_B.any() else None,
    )  # fmt: skip
    return torch.tensor(padded, device=device), cache
