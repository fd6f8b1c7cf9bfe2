"""Generation: sampling rules, unequal prompts, stopping, seeds."""

from dataclasses import replace

import pytest
import torch

from model.generate import Sampling, generate, probabilities
from model.positions.config import PositionConfig
from tests.model.attention.test_kv_cache import make


def rows(decoder, prompts, count, **rest):
    return [list(row) for row in zip(*generate(decoder, prompts, count, **rest), strict=True)]


def test_greedy_takes_the_likeliest_token_of_the_whole_pass():
    decoder = make(PositionConfig(kind="rerope", window=5))
    text = [3, 1, 4, 1, 5]
    chosen = rows(decoder, [text], 12)[0]
    for token in chosen:
        with torch.no_grad():
            assert token == int(decoder(torch.tensor([text]))[0, -1].argmax())
        text = [*text, token]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=7)])
def test_rows_do_not_depend_on_each_other(sampling):
    decoder = make(PositionConfig(kind="leaky-rerope", window=5, leak=4, log_n="trained"), num_key_value_heads=2)
    prompts = [[7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11]]
    together = rows(decoder, prompts, 10, sampling=sampling)
    for row, prompt in enumerate(prompts):
        own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed + row)
        assert rows(decoder, [prompt], 10, sampling=own)[0] == together[row]


def test_seeds_repeat_and_differ():
    decoder = make(PositionConfig())
    texts = [rows(decoder, [[1]], 20, sampling=Sampling(temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_row_ends_at_the_stop_token():
    decoder = make(PositionConfig())
    free = rows(decoder, [[1], [2, 3]], 8)
    stop = free[0][2]
    ended = rows(decoder, [[1], [2, 3]], 8, stop=(stop,))
    first = free[0].index(stop)
    assert ended[0][: first + 1] == free[0][: first + 1]
    assert all(token is None for token in ended[0][first + 1 :])


def test_a_row_ends_at_any_of_several_tokens():
    decoder = make(PositionConfig())
    free = rows(decoder, [[1], [2, 3]], 8)
    ended = rows(decoder, [[1], [2, 3]], 8, stop={row[3] for row in free})
    for row, whole in zip(ended, free, strict=True):
        first = min(whole.index(token) for token in {row[3] for row in free} if token in whole)
        assert row[: first + 1] == whole[: first + 1] and all(token is None for token in row[first + 1 :])


def test_an_id_that_no_token_has_is_never_chosen():
    decoder = make(PositionConfig())
    for sampling in (Sampling(), Sampling(temperature=2.0)):
        [free] = rows(decoder, [[1]], 20, sampling=sampling)
        [made] = rows(decoder, [[1]], 20, sampling=replace(sampling, never=tuple(set(free))))
        assert not set(made) & set(free)


def test_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def kept(**rules):
        return probabilities(logits, Sampling(temperature=1.0, **rules))[0].tolist()

    assert kept() == pytest.approx([0.5, 0.2, 0.15, 0.1, 0.05])
    assert kept(top_k=2) == pytest.approx([5 / 7, 2 / 7, 0, 0, 0])
    assert kept(top_p=0.6) == pytest.approx([5 / 7, 2 / 7, 0, 0, 0])
    assert kept(top_p=0.7001) == pytest.approx([10 / 17, 4 / 17, 3 / 17, 0, 0])
    assert kept(top_p=1e-6) == pytest.approx([1, 0, 0, 0, 0])
    assert kept(top_k=2, top_p=0.6) == pytest.approx([1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, r"top_p = 0.0 must lie in \(0, 1\]"),
    ],
)
def test_bad_rules_are_one_sentence(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**rules)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        list(generate(make(PositionConfig()), [[1], []], 3))
