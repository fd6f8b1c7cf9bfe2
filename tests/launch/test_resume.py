"""What a resumed run says of its learning rate."""

import pytest

from launch.config import RunConfig, build
from launch.resume import rate_remark, refuse_foreign
from trainer.manifest import Meta


def configured(steps: int, *overrides: str) -> RunConfig:
    return build({}, [f"train.steps={steps}", "schedule.warmup_steps=2", *overrides])


def remark(step: int, before: RunConfig, now: RunConfig) -> str:
    return rate_remark(Meta(step=step, tokens=0, config=before.model_dump(mode="json")), now)


@pytest.mark.parametrize(("step", "last", "after"), [(10, "0.1", "0.55"), (6, "0.55", "0.75")])
def test_a_longer_run_raises_the_rate_of_the_next_update_and_says_so(step: int, last: str, after: str):
    """The fall has 8 updates, then 18: update n of them has 1 - 0.9 (n - 2) / 8, then / 18."""
    said = remark(step, configured(10, "schedule.kind=linear"), configured(20, "schedule.kind=linear"))
    assert f"was {last} at update {step} and is {after} at update {step + 1}" in said and "\n" not in said


@pytest.mark.parametrize(
    ("step", "before", "now"),
    [
        (1, configured(10), configured(10)),  # still warming up
        (5, configured(10), configured(10)),
        (10, configured(10), configured(10)),
        (5, configured(20), configured(10)),
        (10, configured(10), configured(20, "schedule.kind=piecewise", "schedule.points=[[0,0.1]]")),
        (0, configured(10), configured(20)),
    ],
)
def test_nothing_is_said_where_nothing_rises(step: int, before: RunConfig, now: RunConfig):
    assert remark(step, before, now) == ""


def test_a_checkpoint_without_a_schedule_is_no_reason():
    assert rate_remark(Meta(step=3, tokens=0, config={"model": {}}), configured(10)) == ""


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([], ["model.num_key_value_heads=4", "model.head_dim=64"]),  # the defaults, written down
        (["model.tie_word_embeddings=false"], ["model.tie_word_embeddings=false", "model.tied_head=plain"]),
    ],
)
def test_the_same_model_in_other_words(before: list[str], now: list[str]):
    meta = Meta(step=3, tokens=0, config=configured(10, *before).model_dump(mode="json"))
    refuse_foreign("here", meta, configured(10, *now), None)


@pytest.mark.parametrize("now", ["model.num_key_value_heads=2", "model.head_dim=32", "model.tied_head=plain"])
def test_another_model(now: str):
    meta = Meta(step=3, tokens=0, config=configured(10).model_dump(mode="json"))
    with pytest.raises(ValueError, match=f"of another model: its {now.partition('=')[0]} is "):
        refuse_foreign("here", meta, configured(10, now), None)
