"""What acts of a configuration, and what has changed between two."""

import pytest

from launch.acting_values import acting_values, changed_values
from launch.config import RunConfig
from launch.load_config import build_config
from launch.resume import inherited, refuse_foreign, settle
from trainer.checkpoint.manifest import CheckpointMeta

LATENT = ["attention=mla", "kv_lora_rank=16", "qk_nope_head_dim=8", "qk_rope_head_dim=8", "v_head_dim=8"]
SAME = [
    ([], "model.num_key_value_heads=4"),
    ([], "model.head_dim=64"),
    ([], "model.query_pre_attn_scalar=64"),
    ([], "model.tie_word_embeddings=true"),
    ([], "model.tied_head=half-swap"),
    ([], "model.intermediate_size=704"),
    ([], "model.kv_lora_rank=8"),  # read by the other kind of attention only
    (["model.tie_word_embeddings=false"], "model.tied_head=plain"),
    ([f"model.{key}" for key in LATENT], "model.latent_norm_eps=1e-5"),
    ([f"model.{key}" for key in LATENT], "model.num_key_value_heads=2"),
    (["model.sliding_window=64"], "model.full_attention_layers=[]"),
    ([], "position.trained_length=1024"),
    ([], "evaluate.position.kind=rope"),
    ([], "schedule.decay_steps=900"),
    (["schedule.kind=warmup-stable-decay"], "schedule.decay_steps=200"),
    ([], "optimizer.max_grad_norm=1.0"),
    ([], "optimizer.compile=false"),
    ([], "optimizer.muon.precision=bf16"),
    ([], "checkpoint.directory=runs/default/checkpoints"),
]
"""Settings, and another that says what acts anyway."""


def configured(*overrides: str) -> RunConfig:
    run, train = {"dir": "runs/default"}, {"steps": 1000, "sequence_length": 1024}
    return build_config({"run": run, "train": train, "schedule": {"warmup_steps": 100}}, overrides)


@pytest.mark.parametrize(("settings", "spelled"), SAME)
def test_what_acts_anyway_may_be_spelled_out(settings: list[str], spelled: str):
    """A resume called num_key_value_heads = 4 another model than the default of 4, or a change."""
    short, full = configured(*settings), configured(*settings, spelled)
    assert acting_values(short) == acting_values(full)
    for before, now in ((short, full), (full, short)):
        meta = CheckpointMeta(3, 3, before.model_dump(mode="json"))
        refuse_foreign("P", meta, now, None)
        assert changed_values(meta.config, now.model_dump(mode="json")) == []
        assert inherited(now, settle(now, meta), meta, "P") == []


@pytest.mark.parametrize(
    ("settings", "other", "line"),
    [
        ([], "model.num_key_value_heads=2", "model.num_key_value_heads: 4 -> 2"),
        ([], "model.head_dim=32", "model.head_dim: 64 -> 32"),
        (["model.tie_word_embeddings=true"], "model.tied_head=plain", "model.tied_head: half-swap -> plain"),
        ([], "evaluate.position.kind=pi", "evaluate.position.kind: rope -> pi"),
        ([], "schedule.decay_steps=800", "schedule.decay_steps: 900 -> 800"),
        ([], "train.steps=2000", "train.steps: 1000 -> 2000"),  # the fall follows it
    ],
)
def test_what_acts_otherwise_is_one_line(settings: list[str], other: str, line: str):
    before, now = configured(*settings), configured(*settings, other)
    assert changed_values(before.model_dump(mode="json"), now.model_dump(mode="json")) == [line]


def test_an_engine_that_does_not_clip_is_said_to():
    before, now = configured().model_dump(mode="json"), configured("parallel.engine=fold").model_dump(mode="json")
    clipping, engine = "optimizer.max_grad_norm: {} -> {}", "parallel.engine: {} -> {}"
    assert changed_values(before, now) == [clipping.format(1.0, 0.0), engine.format("zero", "fold")]
    assert changed_values(now, before) == [clipping.format(0.0, 1.0), engine.format("fold", "zero")]
    unclipped = configured("optimizer.max_grad_norm=0").model_dump(mode="json")
    assert changed_values(unclipped, now) == [engine.format("zero", "fold")]


def test_a_checkpoint_of_an_older_version_lacks_keys():
    values = configured().model_dump(mode="json")
    older = {**values, "model": {key: value for key, value in values["model"].items() if key != "norm_placement"}}
    assert changed_values(older, values) == []
    now = configured("model.norm_placement=post").model_dump(mode="json")
    assert changed_values(older, now) == ["model.norm_placement: pre -> post"]


def test_values_that_no_version_knows_are_compared_as_they_stand():
    now = configured().model_dump(mode="json")
    before = {**now, "train": {**now["train"], "steps": "many"}}
    assert changed_values(before, now) == ["train.steps: many -> 1000"]


@pytest.mark.parametrize(("old", "new", "line"), [("", "def ", "'' -> def "), ("a\n", "a\tb", r"'a\n' -> 'a\tb'")])
def test_a_change_is_one_line_that_can_be_seen(old: str, new: str, line: str):
    before, now = ({"log": {"sample_prompt": prompt}, "data": {"tokenizer": "t"}} for prompt in (old, new))
    assert changed_values(before, now) == [f"log.sample_prompt: {line}"]
