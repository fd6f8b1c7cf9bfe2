"""The reference's network against transformers, torch's attention, rotations pair by pair and published frequencies."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.combinations.cases import BOUNDARIES, LATENT, ROWS, SIZES, S, batch, case, configured, far, shaken, tokens
from tests.combinations.hugging_face import hugging_face, mean_loss
from tests.combinations.network import Layer, Scene, attend, gradients, layer_rules, logits, scene
from tests.combinations.positions import frequencies, log_n, pieces, yarn_factor

HUGGING_FACE = {
    "llama": {"num_key_value_heads": 2, "head_dim": 12, "tied_head": "plain"},
    "llama untied": {"tie_word_embeddings": False},
    "deepseek": {**LATENT, "q_lora_rank": 14, "tie_word_embeddings": False},
    "deepseek without query latent": {**LATENT, "tied_head": "plain"},
}


@pytest.mark.parametrize("model", HUGGING_FACE)
def test_logits_and_gradients_are_hugging_faces(model: str):
    config = configured(model={**SIZES, **HUGGING_FACE[model]})
    weights, batches = shaken(config), [batch(1), batch(2)]
    theirs = hugging_face(config, weights)
    ours = logits(config, {name: weight.double() for name, weight in weights.items()}, batches[0][0])
    assert far(theirs(batches[0][0], use_cache=False).logits, ours) < 1e-13
    want = mean_loss(theirs, batches)
    want.backward()
    loss, found = gradients(config, weights, batches)
    assert loss == pytest.approx(want.item(), rel=1e-13)
    assert max(far(parameter.grad, found[name]) for name, parameter in theirs.named_parameters()) < 1e-12


def test_attention_is_torchs_with_a_window_documents_and_groups():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, heads, S, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    config = configured(model={**SIZES, "sliding_window": 5}, position={"kind": "none"})
    look = scene(config, tokens()[:, :-1], torch.tensor(BOUNDARIES), None)
    document = torch.tensor([sum(b <= t for b in BOUNDARIES) for t in range(ROWS * S)]).view(ROWS, S)
    allowed = torch.tensor([[0 <= i - j < 5 for j in range(S)] for i in range(S)])
    allowed = allowed & (document[:, None, :, None] == document[:, None, None, :])
    got = attend(q, k, v, 8, 0.3, look, layer_rules(config, 0, look), False)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


ROTATION = {
    "rope": lambda r: r,
    "none": lambda r: 0,
    "pi": lambda r: r / 4,
    "rerope": lambda r: min(r, 6),
    "leaky": lambda r: r if r < 6 else 6 + (r - 6) / 8,
    "inverse": lambda r: r if r < 6 else 6 + (r - 6) * 8,
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ROTATION)
def test_every_pair_is_turned_by_the_map_of_its_distance(name: str, interleaved: bool):
    """Complex products pair by pair; the values are an identity matrix, so that attention's output is its weights."""
    position, generator = case("mha", name).position, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, S, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    nowhere = torch.zeros(1, S, dtype=torch.long)
    look = Scene(position, S, nowhere, nowhere)
    how = Layer(pieces(position), None, torch.ones(1, S, dtype=torch.float64))
    got = attend(q, k, torch.eye(S, dtype=torch.float64)[None, None], 8, 0.5, look, how, interleaved)[0, 0]
    pairs = [(2 * c, 2 * c + 1) if interleaved else (c, c + 4) for c in range(4)]
    for i in range(S):
        scores = []
        for j in range(i + 1):
            angles = [ROTATION[name](i - j) * position.rope_theta ** (-c / 4) for c in range(4)]
            turned = [complex(q[0, 0, i, a], q[0, 0, i, b]) * complex(math.cos(t), math.sin(t))
                      for (a, b), t in zip(pairs, angles, strict=True)]  # fmt: skip
            met = [(z * complex(k[0, 0, j, a], -k[0, 0, j, b])).real for (a, b), z in zip(pairs, turned, strict=True)]
            scores.append(0.5 * sum(met))
        want = torch.tensor(scores, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(got[i, : i + 1], want, rtol=0, atol=1e-13)
        assert not got[i, i + 1 :].any()


PUBLISHED = {
    ("ntk", "rotations", 0.5): (1, 0.05, 0.0025, 0.000125),
    ("ntk-mixed", "rotations", 1.0): (0.594603558, 0.0353553391, 0.00210224104, 0.000125),
    ("ntk-mixed", "rotations", 0.625): (0.417154981, 0.0259668095, 0.00176005376, 0.000125),
    ("ntk-mixed", "rotations", 0.75): (0.479412632, 0.0290415292, 0.00187143605, 0.000125),
    ("yarn", "rotations", 0.5): (1, 0.0326778756, 0.00125, 0.000125),
    ("yarn", "index", 0.5): (1, 0.05625, 0.00125, 0.000125),
}
"""Eight channels, base 10,000, factor 8, trained at 512 tokens (kexue.fm/archives/9675, 9706, 9948)."""


@pytest.mark.parametrize("key", PUBLISHED)
def test_frequencies_are_the_published_ones(key: tuple[str, str, float]):
    name, ramp, exponent = key
    own = {"yarn": {"yarn_ramp": ramp}, "ntk-mixed": {"mixed_exponent": exponent}}.get(name, {})
    section = {"kind": name, "factor": 8.0, **own}
    position = configured(position=section).position
    assert frequencies(position, 8, 512).tolist() == pytest.approx(PUBLISHED[key], rel=1e-8)
    assert yarn_factor(position) == pytest.approx(1.45912908 if name == "yarn" else 1.0, rel=1e-8)


@pytest.mark.parametrize(("when", "factors"), [("none", (1, 1, 1)), ("trained", (0, 0.5, 1.5)), ("inference", (1, 1, 1.5))])
def test_log_n_counts_the_tokens_that_are_seen(when: str, factors: tuple[float, ...]):
    position = configured(position={"log_n": when}).position
    assert log_n(position, torch.tensor([[0, 1, 7]]), 4).tolist() == [pytest.approx(factors)]
