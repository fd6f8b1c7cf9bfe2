import pytest
from pydantic import ValidationError

from data.config import DataConfig, PhaseConfig, SourceConfig


def test_a_path_is_a_mixture_of_one_and_nothing_is_none():
    config = DataConfig(train="a", validation=[SourceConfig(path="b", weight=2), SourceConfig(path="c")])
    assert config.sources("train") == [SourceConfig(path="a", weight=1.0)]
    assert [(source.path, source.weight) for source in config.sources("validation")] == [("b", 2.0), ("c", 1.0)]
    assert DataConfig().sources("validation") == []


@pytest.mark.parametrize("starts", [[4, 4], [5, 2]])
def test_phases_must_come_one_after_another(starts):
    phases = [PhaseConfig(from_step=step, sources=[SourceConfig(path="a")]) for step in starts]
    with pytest.raises(ValidationError, match="increasing from_step"):
        DataConfig(train="a", curriculum=phases)
    assert len(DataConfig(train="a", curriculum=[phases[0].model_copy(update={"from_step": 1}), phases[0]]).curriculum) == 2


@pytest.mark.parametrize(
    "wrong", [{"path": "a", "weight": 0}, {"path": "a", "weight": float("inf")}, {"path": "a", "share": 1}]
)
def test_a_source_has_a_positive_weight_and_no_other_key(wrong):
    with pytest.raises(ValidationError):
        SourceConfig(**wrong)
