import pytest

from launch.load_config import build_config


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["train.stesp=3"], "unknown key train.stesp; did you mean steps?"),
        (["optimizer.lr=3"], "unknown key optimizer.lr; legal here: name, max_grad_norm"),
        (["model.steps=3"], "unknown key model.steps; did you mean train.steps?"),
        (["training.steps=3"], "unknown key training; did you mean train?"),
        (["train.steps=many"], "train.steps = 'many': input should be a valid integer"),
        (["train.steps=-1"], "train.steps = -1: input should be greater than 0"),
        (["train.steps"], "override 'train.steps' must read section.key=value"),
        (["parallel.zero_stage=0"], "parallel.zero_stage = 0: input should be 1, 2 or 3"),
        (["model.head_dim=7"], "[model] head_dim = 7 must be even"),
        (["model.attention=mla"], "[model] attention = 'mla' needs kv_lora_rank, qk_nope_head_dim"),
        (["run.dir="], "run.dir = '': string should have at least 1 character"),
        (["data.train=[{path='a',wieght=2}]"], "unknown key data.train.0.wieght; did you mean weight?"),
        (["data.train=[{path='a'},{path='b',x=2}]"], "unknown key data.train.1.x; legal here: path, weight"),
        (["data.train=[3]"], "data.train.0 = 3: it takes a table, as {name = value}"),
        (
            ["data.curriculum=[{from_steps=2,sources=[{path='a'}]}]"],
            "unknown key data.curriculum.0.from_steps; did you mean from_step?",
        ),
        (
            ["data.curriculum=[{from_step=2,sources=[{pat='a'}]}]"],
            "unknown key data.curriculum.0.sources.0.pat; did you mean path?",
        ),
        (["data.curriculum=3"], "data.curriculum = 3: it takes a list"),
        (["schedule.points=[3]"], "schedule.points.0 = 3: it takes a list"),
        (["optimizer.rules=3"], "optimizer.rules = 3: it takes a table, as {name = value}"),
        (["data.train=[{path='a',weight=0}]"], "data.train.0.weight = 0: input should be greater than 0"),
        (["position.log_n=inference", "position.trained_length=1"], "log_n = 'inference' divides by log(trained_length)"),
        (["position.kind=rerope", "position.window=0"], "[position] kind = 'rerope' needs window >= 1"),
        (["position.kind=leaky-rerope", "position.window=8", "position.leak=0"], "needs leak > 0"),
        (["parallel.sequence_parallel=true"], "sequence_parallel needs tensor_parallel_size > 1"),
        (["parallel.zero_hpz_partition_size=4"], "zero_hpz_partition_size = 4 belongs to engine = 'zero' with zero_stage = 3"),
        (["schedule.kind=piecewise"], "points and kind = 'piecewise' go together"),
        (["train.length_ramp=[[5,64],[5,128]]"], "length_ramp must have increasing steps above 0, got [5, 5]"),
        (["train.length_ramp=[[5,0]]"], "length_ramp must have at least 1 token per row, got 0"),
        (["data.pack=whole"], "data.pack = 'whole'"),
    ],
)
def test_a_mistake_is_one_sentence(overrides: list[str], wanted: str):
    with pytest.raises(ValueError) as caught:
        build_config({}, overrides)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)
