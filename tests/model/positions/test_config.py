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
        ({"kind": "rope", "factor": 2}, "factor = 2.0 has no meaning"),
    ],
)
def test_bad_maps_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        PositionConfig(**settings)


def test_another_map_keeps_what_training_depends_on():
    trained = PositionConfig(rope_theta=5e5, trained_length=512, log_n="trained")
    assert PositionConfig(**trained.evaluation_values({"kind": "rerope", "window": 64})) == PositionConfig(
        kind="rerope", window=64, rope_theta=5e5, trained_length=512, log_n="trained"
    )
    assert trained.evaluation_values({"rope_theta": 1e6})["rope_theta"] == 1e6
