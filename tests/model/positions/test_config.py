"""Maps that contradict themselves are refused in one sentence; what another map keeps."""

import pytest
from pydantic import ValidationError

from model.positions.config import PositionConfig


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"kind": "rerope", "window": 0}, "needs window >= 1"),
        ({"kind": "rerope"}, "needs window >= 1"),
        ({"kind": "leaky-rerope", "window": 4, "leak": 0}, "needs leak > 0"),
        ({"kind": "rope", "window": 4}, "window = 4 has no meaning"),
        ({"kind": "rope", "factor": 2}, "factor = 2.0 has no meaning for kind = 'rope'; remove it or use pi or ntk or"),
        ({"kind": "llama3", "low_freq_factor": 4.0}, "needs high_freq_factor > low_freq_factor, got 4.0 and 4.0"),
        ({"kind": "yarn", "beta_slow": 40.0}, "needs beta_fast > beta_slow, got 32.0 and 40.0"),
        ({"kind": "yarn", "yarn_truncate": False}, "with yarn_ramp = 'rotations' has no indices to round"),
        ({"kind": "yarn", "high_freq_factor": 2.0}, "high_freq_factor = 2.0 has no meaning for kind = 'yarn'; .* llama3"),
        ({"kind": "ntk", "rotated_factor": 2.0}, "rotated_factor = 2.0 has no meaning for kind = 'ntk'; .* yarn"),
        ({"kind": "ntk", "yarn_ramp": "index"}, "yarn_ramp = index has no meaning for kind = 'ntk'; remove it or use yarn"),
    ],
)
def test_bad_maps_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        PositionConfig(**settings)


def test_another_map_keeps_what_training_depends_on():
    trained = PositionConfig(rope_theta=5e5, windowed_rope_theta=1e3, trained_length=512, log_n="trained")
    assert PositionConfig(**trained.evaluation_values({"kind": "rerope", "window": 64})) == PositionConfig(
        kind="rerope", window=64, rope_theta=5e5, windowed_rope_theta=1e3, trained_length=512, log_n="trained"
    )
    assert trained.evaluation_values({"rope_theta": 1e6})["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "evaluated, trained, length",
    [
        (PositionConfig(), PositionConfig(), 512),
        (PositionConfig(kind="pi", factor=8), PositionConfig(), 511 * 8 + 1),
        (PositionConfig(kind="rerope", window=256), PositionConfig(), None),
        (PositionConfig(kind="rerope", window=512), PositionConfig(), 512),
        (PositionConfig(kind="leaky-rerope", window=128, leak=16), PositionConfig(), 128 + 383 * 16 + 1),
        (PositionConfig(), PositionConfig(kind="leaky-rerope", window=128, leak=1 / 16), 6257),
        (PositionConfig(kind="none"), PositionConfig(kind="none"), None),
    ],
)
def test_usable_length(evaluated, trained, length):
    """Trained at 512; inverse Leaky w = 128, k = 1/16 meets distances up to 6,256 (Su 2023, kexue.fm/archives/9728)."""
    assert evaluated.usable_length(trained, 512) == length
