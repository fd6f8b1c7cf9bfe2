"""Which values a checkpoint decides, whether it may be resumed, and what is said of the learning rate."""

import pytest

from data.corpus.plan import DataPlan
from launch.batches import ahead, batch_sizes, micro_batches, total_batches, total_tokens
from launch.config import RunConfig
from launch.load_config import build_config
from launch.resume import (
    asked_for,
    changed_values,
    ended_ramp,
    inherited,
    rate_remark,
    reached,
    refuse_foreign,
    resume_differences,
    settle,
)
from trainer.checkpoint.manifest import CheckpointMeta
from trainer.config import TrainConfig
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.lion import Lion
from trainer.state import State


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


MICRO = ["train.micro_batch_size=2", "train.steps=9"]


def resumed(before: list[str], batch: int, now: list[str]) -> tuple[RunConfig, RunConfig, CheckpointMeta]:
    """What is asked for and what acts where a run of `before` has read so many batches; and the checkpoint."""
    config = build_config({}, [*MICRO, *before]).model_dump(mode="json")
    meta = CheckpointMeta(step=batch, tokens=0, config=config, extra={"batch": batch})
    asked = build_config({}, [*MICRO, *now])
    return asked, settle(asked, meta), meta


def size(sequences: int) -> str:
    return f"train.global_batch_size={sequences}"


def ramp(*pieces: list[int]) -> str:
    return f"train.batch_ramp={[*pieces]}"


@pytest.mark.parametrize(
    ("before", "batch", "now", "sizes"),
    [
        ([size(4)], 4, [size(4)], [4] * 9),
        ([size(4)], 4, [], [4] * 9),
        ([size(4)], 4, [size(8)], [4, 4, 4, 4, 8, 8, 8, 8, 8]),
        ([size(4)], 4, [size(2)], [4, 4, 4, 4, 2, 2, 2, 2, 2]),
        ([size(4)], 0, [size(8)], [8] * 9),
        # a ramp that is over, given again, left unset and emptied
        ([size(4), ramp([2, 2])], 4, [size(8), ramp([2, 2])], [2, 2, 4, 4, 8, 8, 8, 8, 8]),
        ([size(4), ramp([2, 2])], 4, [size(8)], [2, 2, 4, 4, 8, 8, 8, 8, 8]),
        ([size(4), ramp([2, 2])], 4, [size(8), ramp()], [2, 2, 4, 4, 8, 8, 8, 8, 8]),
        ([size(4), ramp([2, 2])], 4, [], [2, 2, 4, 4, 4, 4, 4, 4, 4]),
        # one that is not: it continues if it is given or nothing else is, and ends with another size
        ([size(8), ramp([2, 2], [6, 4])], 4, [], [2, 2, 4, 4, 4, 4, 8, 8, 8]),
        ([size(8), ramp([2, 2], [6, 4])], 4, [size(8)], [2, 2, 4, 4, 4, 4, 8, 8, 8]),
        ([size(8), ramp([2, 2], [6, 4])], 4, [size(16)], [2, 2, 4, 4, 16, 16, 16, 16, 16]),
        ([size(8), ramp([2, 2], [6, 4])], 1, [size(16)], [2, 16, 16, 16, 16, 16, 16, 16, 16]),
        ([size(8), ramp([2, 2], [6, 4])], 4, [size(16), ramp([2, 2], [6, 4])], [2, 2, 4, 4, 4, 4, 16, 16, 16]),
        ([size(8), ramp([2, 2], [6, 4])], 4, [size(8), ramp()], [2, 2, 4, 4, 8, 8, 8, 8, 8]),
        ([size(8), ramp([2, 2], [6, 4])], 4, [ramp([2, 2], [5, 4], [7, 6])], [2, 2, 4, 4, 4, 6, 6, 8, 8]),
        ([size(4)], 4, [size(16), ramp([4, 4], [6, 8])], [4, 4, 4, 4, 8, 8, 16, 16, 16]),
    ],
)  # fmt: skip
def test_sizes_after_a_resume(before: list[str], batch: int, now: list[str], sizes: list[int]):
    asked, acting, meta = resumed(before, batch, now)
    found = batch_sizes(acting.train)
    assert [found.of(n) for n in range(9)] == sizes and [found.before(n) for n in range(9)] == [
        sum(sizes[:n]) for n in range(9)
    ]
    assert [batch_sizes(ahead(acting, reached(meta)).train).of(n) for n in range(9 - batch)] == sizes[batch:]
    file = build_config(asked_for(asked, acting))
    assert [batch_sizes(file.train).of(n) for n in range(9)] == sizes, "RUN/config.toml"
    later = CheckpointMeta(7, 0, acting.model_dump(mode="json"), extra={"batch": 7})
    assert batch_sizes(settle(asked, later).train) == batch_sizes(settle(file, later).train) == found, "the same command again"
    total = sum(sizes) * acting.train.sequence_length
    done = State(batch, sum(sizes[:batch]) * acting.train.sequence_length, batch)
    assert total_tokens(acting.train) == total == total_tokens(acting.train, done)


@pytest.mark.parametrize(
    ("before", "now", "trained", "given"),
    [
        ([size(4)], [size(4), ramp([2, 2])], "4", "2 until batch 2, then 4"),
        ([size(4)], [ramp([2, 2])], "4", "2 until batch 2, then 4"),
        ([size(4)], [size(8), ramp([6, 2])], "4", "2"),
        ([size(4)], [size(8), ramp([3, 4], [6, 2])], "4", "4 until batch 3, then 2"),
        ([size(4), ramp([2, 2])], [ramp([4, 4])], "2 until batch 2, then 4", "4"),
    ],
)
def test_a_ramp_that_was_not_trained(before: list[str], now: list[str], trained: str, given: str):
    """It stays as it is given, for the plan of the data to be refused (data/corpus/plan.py)."""
    asked, acting, meta = resumed(before, 4, now)
    assert acting.train.batch_ramp == asked.train.batch_ramp
    plans = [DataPlan(0, 256, "t", batch_sizes(config), ()) for config in (TrainConfig(**meta.config["train"]), acting.train)]
    assert plans[1].other_past(plans[0], 4).startswith(f"the sizes of the 4 batches so far were {trained} and are {given} (")


def test_a_size_that_ends_a_ramp_is_told():
    ramped = [size(8), ramp([2, 2], [6, 4])]
    told = resume_differences(*resumed(ramped, 4, [size(16)]), "P", False)
    assert [line for line in told if line.startswith("train.global_batch_size = 16 holds from batch 4 on and ends the ramp")]
    assert "changed since P: train.batch_ramp: [[2, 2], [6, 4]] -> [[2, 2], [4, 4]]" in told
    assert "(4 until batch 6, then 8)" in ended_ramp(*resumed(ramped, 4, [size(16)]))
    assert not [line for line in told if line.startswith("as in")]
    ended = [size(4), ramp([2, 2])]
    words = "train.batch_ramp acts as [[2, 2], [4, 4]]: the batches before batch 4 are those that were trained"
    assert words in resume_differences(*resumed(ended, 4, [size(8), ramp([2, 2])]), "P", False)
    assert not [line for line in resume_differences(*resumed(ended, 4, ended), "P", False) if "acts as" in line]
    for batch, now in ((4, []), (4, [size(8)]), (4, [size(16), ramp([2, 2], [6, 4])]), (6, [size(16)])):
        assert ended_ramp(*resumed(ramped, batch, now)) == ""


@pytest.mark.parametrize("micro", [4, 8])
def test_only_batches_to_come_must_divide(micro: int):
    """Of one micro-batch or a ramp that is over, on one rank and on two."""
    larger = [f"train.micro_batch_size={micro}", size(16)]
    for before in ([size(2)], [size(4), ramp([2, 2])]):
        _, acting, meta = resumed(before, 4, larger)
        left = ahead(acting, reached(meta))
        assert [micro_batches(left, ranks) for ranks in (1, 2)] == [16 // micro, 8 // micro]
        with pytest.raises(ValueError, match=r"train\.batch_ramp has 2 sequences, which is not a multiple of train.micro"):
            micro_batches(acting, 1)
    _, acting, meta = resumed([size(8), ramp([2, 2], [6, 6])], 4, [*larger, ramp([2, 2], [6, 6])])
    with pytest.raises(ValueError, match=r"train\.batch_ramp has 6 sequences"):
        micro_batches(ahead(acting, reached(meta)), 1)


def test_a_size_that_is_left_unset_is_the_checkpoints():
    asked = build_config({}, ["train.micro_batch_size=3"])  # which the default, 32, is no multiple of
    meta = CheckpointMeta(4, 0, build_config({}, [size(6), MICRO[0]]).model_dump(mode="json"))
    assert micro_batches(ahead(settle(asked, meta), reached(meta)), 2) == 1
    with pytest.raises(ValueError, match=r"global_batch_size = 32 is not a multiple of train\.micro_batch_size = 3 times 1"):
        micro_batches(asked, 1)
    meta = CheckpointMeta(4, 0, build_config({}, [size(8), MICRO[0]]).model_dump(mode="json"))
    with pytest.raises(ValueError, match=r"train\.global_batch_size = 8 is not divisible by train\.micro_batch_size = 3"):
        settle(asked, meta)


def test_rewinds_move_a_run_on_in_its_data():
    """20 updates with 12 batches of 2 and then of 8: at step 9, 8 batches were left behind."""
    config = build_config({}, ["train.steps=20", "train.sequence_length=64", size(8), ramp([12, 2]), MICRO[0]])
    meta = CheckpointMeta(9, 64 * (4 * 2 + 5 * 8), config.model_dump(mode="json"), extra={"batch": 17})
    state = reached(meta)
    assert total_batches(config.train, state) == 17 + 11 and total_batches(config.train) == 20
    assert total_tokens(config.train, state) == meta.tokens + 64 * 8 * 11
    assert ahead(config, state).train.steps == 11 and ahead(config, state).train.batch_ramp == []
    told = resume_differences(config, config, meta, "P", False)
    assert [line for line in told if line.startswith("step 9 continues with batch 17, since rewinds left 8 batches behind: ")]
    assert resume_differences(config, config, CheckpointMeta(9, 0, meta.config, extra={"batch": 9}), "P", False) == []
    over = State(30, 5, 38)
    assert (total_batches(config.train, over), total_tokens(config.train, over)) == (38, 5)
    assert settle(build_config({}, [MICRO[0], size(16)]), meta).train.batch_ramp == [(12, 2), (17, 8)]


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
