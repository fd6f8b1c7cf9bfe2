"""Which values a checkpoint decides, whether it may be resumed, and what is said of the learning rate."""

import pytest

from launch.config import RunConfig, build_config
from launch.resume import changed_values, inherited, rate_remark, refuse_foreign, settle
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.lion import Lion


def configured(steps: int, *overrides: str) -> RunConfig:
    return build_config({}, [f"train.steps={steps}", "schedule.warmup_steps=2", *overrides])


def remark(step: int, before: RunConfig, now: RunConfig) -> str:
    return rate_remark(CheckpointMeta(step=step, tokens=0, config=before.model_dump(mode="json")), now)


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
    assert rate_remark(CheckpointMeta(step=3, tokens=0, config={"model": {}}), configured(10)) == ""


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([], ["model.num_key_value_heads=4", "model.head_dim=64"]),  # the defaults, written down
        (["model.tie_word_embeddings=false"], ["model.tie_word_embeddings=false", "model.tied_head=plain"]),
    ],
)
def test_the_same_model_in_other_words(before: list[str], now: list[str]):
    meta = CheckpointMeta(step=3, tokens=0, config=configured(10, *before).model_dump(mode="json"))
    refuse_foreign("here", meta, configured(10, *now), None)


@pytest.mark.parametrize("now", ["model.num_key_value_heads=2", "model.head_dim=32", "model.tied_head=plain"])
def test_another_model(now: str):
    meta = CheckpointMeta(step=3, tokens=0, config=configured(10).model_dump(mode="json"))
    with pytest.raises(ValueError, match=f"of another model: its {now.partition('=')[0]} is "):
        refuse_foreign("here", meta, configured(10, now), None)


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        (
            ["model.hidden_size=64", "model.num_attention_heads=2"],
            r"its model\.hidden_size is 256, this run's 64 and its model\.num_attention_heads is 4, this run's 2 and .*"
            r"\(so model\.embed_tokens\.weight is \[4096, 256\] there and \[4096, 64\] here\); use its",
        ),
        (
            ["model.tie_word_embeddings=false"],
            r"tie_word_embeddings is True, .*\(so lm_head\.weight is none there and \[4096, 256\] here\)",
        ),
        (["model.qk_norm=key-l2"], r"its model\.qk_norm is none, this run's key-l2; use its"),
    ],
)
def test_another_model_names_every_key_and_the_first_parameter(now: list[str], sentence: str):
    meta = CheckpointMeta(step=3, tokens=0, config=configured(10).model_dump(mode="json"))
    with pytest.raises(ValueError, match=sentence):
        refuse_foreign("here", meta, configured(10, *now, "optimizer.rules.embedding.rule=adamw"), None)


def test_keys_that_shape_no_weight_may_change():
    meta = CheckpointMeta(step=3, tokens=0, config=configured(10).model_dump(mode="json"))
    refuse_foreign("here", meta, configured(10, "model.sliding_window=8", "model.rms_norm_eps=1e-6"), None)


def meta_of(config: RunConfig) -> CheckpointMeta:
    return CheckpointMeta(step=4, tokens=4, config=config.model_dump(mode="json"))


ASKED = {"data": {"train": "corpus"}}
OPTIMIZER = {"tiger": {"learning_rate": 3e-3}}


def test_training_keys_left_unset_are_those_of_the_checkpoint_even_where_a_default_has_changed():
    saved = meta_of(
        build_config({**ASKED, "optimizer": {"tiger": {"learning_rate": 3e-3}}, "train": {"steps": 70}, "run": {"seed": 5}})
    )
    saved.config["optimizer"]["tiger"]["weight_decay"] = 0.07  # the default of the version that wrote it
    saved.config["model"]["rms_norm_eps"] = 1e-4
    acting = settle(build_config(ASKED), saved)
    assert (acting.optimizer.tiger.learning_rate, acting.optimizer.tiger.weight_decay) == (3e-3, 0.07)
    assert (acting.model.rms_norm_eps, acting.train.steps, acting.run.seed) == (1e-4, 70, 5)
    asked = build_config({**ASKED, "optimizer": {"tiger": {"weight_decay": 0.02}}, "train": {"steps": 80}})
    acting = settle(asked, saved)
    assert (acting.optimizer.tiger.weight_decay, acting.optimizer.rate, acting.train.steps) == (0.02, 3e-3, 80)
    told = inherited(asked, acting, saved, "P")
    assert "as in P: optimizer.tiger.learning_rate = 0.003 (left unset; the default is 0.001)" in told
    assert "as in P: model.rms_norm_eps = 0.0001 (left unset; the default is 1e-05)" in told
    assert not [line for line in told if "weight_decay" in line or "train.steps" in line]


def test_layout_keys_are_chosen_anew():
    saved = meta_of(build_config({**ASKED, "parallel": {"zero_stage": 3}, "train": {"micro_batch_size": 2, "compile": True},
                           "checkpoint": {"keep": 9}, "log": {"every_steps": 7}}))  # fmt: skip
    acting = settle(build_config(ASKED), saved)
    assert acting.parallel.zero_stage == 1 and acting.train.micro_batch_size == 8 and not acting.train.compile
    assert acting.checkpoint.keep == 2 and acting.log.every_steps == 10


def test_values_that_belong_to_another_choice_are_not_taken_over():
    lines = {"embedding": {"rule": "adamw", "eps": 1e-6}}
    tiger = {**ASKED, "optimizer": {"tiger": {"beta": 0.9, "learning_rate": 2e-3}, "rules": lines}}
    acting = settle(build_config({**ASKED, "optimizer": {"name": "lion"}}), meta_of(build_config(tiger)))
    assert acting.optimizer.assigned("w", "matrix").rule == Lion() and acting.optimizer.tiger.beta == 0.9
    assert acting.optimizer.assigned("w", "embedding").rule == AdamW(eps=1e-6)
    piecewise = {**ASKED, "schedule": {"kind": "piecewise", "points": [[0, 1.0]]}}
    assert (
        settle(build_config({**ASKED, "schedule": {"kind": "cosine"}}), meta_of(build_config(piecewise))).schedule.points == []
    )
    rerope = {**ASKED, "position": {"kind": "rerope", "window": 32, "rope_theta": 500.0}}
    acting = settle(build_config({**ASKED, "position": {"kind": "rope"}}), meta_of(build_config(rerope)))
    assert acting.position.window is None and acting.position.rope_theta == 500.0
    clipped = {**ASKED, "optimizer": {"name": "tiger", "max_grad_norm": 0.5}}
    assert (
        settle(build_config({**ASKED, "parallel": {"engine": "fold"}}), meta_of(build_config(clipped))).optimizer.max_grad_norm
        is None
    )


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ("def f():\n", "a\tb", r"log.sample_prompt: 'def f():\n' -> 'a\tb'"),
        ("", "ünï ", "log.sample_prompt: '' -> ünï "),
        ("\x1b[31m", "x\u2028y", r"log.sample_prompt: '\x1b[31m' -> 'x\u2028y'"),
    ],
)
def test_a_changed_value_is_one_line(before: str, now: str, line: str):
    old, new = ({"log": {"sample_prompt": value, "every_steps": 2}} for value in (before, now))
    assert changed_values(old, new) == [line]


def test_a_value_that_is_taken_over_is_one_line():
    asked, acting = (build_config({"data": data}) for data in ({}, {"tokenizer": "a\nb"}))
    told = inherited(asked, acting, meta_of(acting), "step-8")
    assert [line for line in told if "tokenizer" in line] == [
        r"as in step-8: data.tokenizer = 'a\nb' (left unset; the default is '')"
    ]
