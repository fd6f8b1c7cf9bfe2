import re
from pathlib import Path

import pytest

from launch.config import build_config, dump, load_config, micro_batches
from launch.shipped import SHIPPED


def test_defaults_hold_together():
    config = build_config({})
    assert config.model.kv_heads == 4 and config.optimizer.name == "tiger"


def test_file_then_overrides(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nsteps = 7\nprecision = "fp32"\n')
    config = load_config(path, ["train.steps=9", "run.dir=elsewhere", "optimizer.tiger.beta=0.9", "data.document_mask=true"])
    assert (config.train.steps, config.train.precision, config.run.dir) == (9, "fp32", "elsewhere")
    assert config.optimizer.tiger.beta == 0.9 and config.data.document_mask


def test_dump_reads_back_to_the_same(tmp_path: Path):
    values = {
        "data": {
            "train": [{"path": "a\\b", "weight": 0.1}, {"path": 'c"d'}],
            "curriculum": [{"from_step": 3, "sources": [{"path": "x"}]}],
        },
        "schedule": {"kind": "piecewise", "points": [(10, 1.0), (20, 0.5)]},
        "evaluate": {"position": {"kind": "rerope", "window": 8}},
        "optimizer": {"tiger": {"learning_rate": 1.1e-3}, "rules": {"*.o_proj.*": {"rule": "lion", "betas": [0.5, 0.6]}}},
    }  # fmt: skip
    path = tmp_path / "run.toml"
    config = build_config(values)
    path.write_text(dump(config))
    assert load_config(path) == config


def test_what_was_learned_of_positions_stays_when_they_are_read_with_another_map():
    learned = ["position.rope_theta=500", "position.log_n=trained", "position.trained_length=64"]
    read = build_config({}, [*learned, "evaluate.position={kind='rerope',window=24}"]).evaluate.position
    assert read is not None
    assert (read.kind, read.window, read.rope_theta, read.log_n, read.trained_length) == ("rerope", 24, 500, "trained", 64)
    read = build_config({}, [*learned, "evaluate.position={kind='rope',rope_theta=1e6,log_n='none'}"]).evaluate.position
    assert read is not None and (read.rope_theta, read.log_n, read.trained_length) == (1e6, "none", 64)


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
        (
            ["parallel.tensor_parallel_size=3"],
            "model.vocab_size = 4096 is not divisible by parallel.tensor_parallel_size = 3",
        ),
        (["train.global_batch_size=9"], "train.global_batch_size = 9 is not divisible by train.micro_batch_size = 8"),
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
        (["train.sequence_length=1", "position.log_n=trained"], "position.log_n = 'trained' divides by the logarithm"),
        (["position.log_n=inference", "position.trained_length=1"], "log_n = 'inference' divides by log(trained_length)"),
        (
            ["train.sequence_length=1", "evaluate.position={kind='none',log_n='inference'}"],
            "evaluate.position.log_n = 'inference' divides by the logarithm",
        ),
        (["position.windowed_rope_theta=50"], "position.windowed_rope_theta = 50.0 has no layer to act in"),
        (
            [
                "model.sliding_window=8",
                "model.num_hidden_layers=2",
                "model.full_attention_layers=[0]",
                "model.layers_without_positions=[1]",
                "evaluate.position={kind='pi',factor=2,windowed_rope_theta=50}",
            ],
            "evaluate.position.windowed_rope_theta = 50.0 has no layer to act in: no layer is windowed and has positions",
        ),
        (["position.kind=rerope", "position.window=0"], "[position] kind = 'rerope' needs window >= 1"),
        (["position.kind=leaky-rerope", "position.window=8", "position.leak=0"], "needs leak > 0"),
        (
            ["optimizer.rules.embedding.rows=seen"],
            "rows = 'seen' cannot be used with model.tie_word_embeddings = true",
        ),
        (["parallel.engine=fold", "optimizer.name=lion"], "parallel.engine = 'fold' cannot run optimizer.name = 'lion'"),
        (["parallel.engine=fold", "optimizer.max_grad_norm=1"], "parallel.engine = 'fold' cannot clip"),
        (["parallel.sequence_parallel=true"], "sequence_parallel needs tensor_parallel_size > 1"),
        (["parallel.zero_hpz_partition_size=4"], "zero_hpz_partition_size = 4 belongs to engine = 'zero' with zero_stage = 3"),
        (["schedule.kind=piecewise"], "points and kind = 'piecewise' go together"),
    ],
)
def test_a_mistake_is_one_sentence(overrides: list[str], wanted: str):
    with pytest.raises(ValueError) as caught:
        build_config({}, overrides)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


GRAPHS = ["train.cuda_graphs=true", "train.compile=true"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["train.compile=false"], "train.compile = false: it replays compiled blocks; use train.compile=true"),
        (["train.precision=fp32"], "train.precision = 'fp32' and parallel.engine = 'zero'"),
        (["train.recompute=full"], "train.recompute = 'full'"),
        (["train.recompute=auto"], "train.recompute = 'auto'"),
        (["data.document_mask=true"], "data.document_mask = true"),
        (["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size = 2"),
        (["parallel.zero_stage=3"], "parallel.zero_stage = 3"),
        (["parallel.offload=cpu"], "parallel.offload = 'cpu'"),
        (["optimizer.qk_clip=100"], "optimizer.qk_clip = 100"),
        (
            ["model.hidden_size=64", "model.intermediate_size=4096", "parallel.reduce_bucket_elements=262143"],
            "parallel.reduce_bucket_elements = 262143: gradients of more elements, such as the 262144 of "
            "model.layers.0.mlp.gate_proj.weight, are sent while the next replay overwrites them; "
            "use parallel.reduce_bucket_elements=262144 or more",
        ),
    ],
)
def test_what_cuda_graphs_cannot_do_is_one_sentence_with_a_remedy(overrides: list[str], wanted: str):
    with pytest.raises(ValueError) as caught:
        build_config({}, [*GRAPHS, *overrides])
    assert str(caught.value).startswith(f"train.cuda_graphs = true cannot be used with {wanted}")
    assert re.search(r"; use [a-z_.]+=\w+( or [\w.=]+)?$", str(caught.value))
    assert build_config({}, [*overrides, "train.cuda_graphs=false"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.zero_stage=2"],
        ["parallel.engine=fold"],
        ["parallel.engine=fold", "train.precision=fp32"],
        ["parallel.engine=fold", "parallel.reduce_bucket_elements=1000"],  # fold sends momentum, not gradients
        ["model.vocab_size=65536", "model.hidden_size=64", "parallel.reduce_bucket_elements=100000"],  # no graph holds a head
    ],
)
def test_what_cuda_graphs_can_do_is_let_through(overrides: list[str]):
    assert build_config({}, [*GRAPHS, *overrides]).train.cuda_graphs


@pytest.mark.parametrize("norm", ["rms", "rms-all-heads", "key-l2"])
def test_logits_of_normed_queries_or_keys_are_not_clipped(norm: str):
    with pytest.raises(
        ValueError, match=rf"^optimizer.qk_clip = 100 cannot be used with model.qk_norm = '{norm}': .*leave one"
    ):
        build_config({}, ["optimizer.qk_clip=100", f"model.qk_norm={norm}"])
    assert build_config({}, ["optimizer.qk_clip=100", "model.attention_bias=qkv"]).optimizer.qk_clip == 100
    with pytest.raises(ValueError, match=r"optimizer\.qk_clip = 0: input should be greater than 0"):
        build_config({}, ["optimizer.qk_clip=0"])


@pytest.mark.parametrize(("bare", "layer"), [("model.layers_without_positions=[-1]", 3), ("position.kind=none", 0)])
def test_logits_are_not_clipped_for_biases_that_no_loss_holds(bare: str, layer: int):
    """They drift by rounding alone under sign updates and AdamW: their gradient is zero but for it."""
    clipped = ["optimizer.qk_clip=100", "model.num_hidden_layers=4", bare]
    with pytest.raises(ValueError, match=rf"^optimizer.qk_clip = 100 cannot .* 'all' where layer {layer} has no .*leave one"):
        build_config({}, [*clipped, "model.attention_bias=all"])
    assert build_config({}, clipped).optimizer.qk_clip == 100


def test_a_shipped_file_is_named_without_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_config("quickstart", ["train.steps=3"]) == load_config(SHIPPED / "quickstart.toml", ["train.steps=3"])
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("[train]\nsteps = 7\n")  # the user's own comes first
    assert load_config("quickstart").train.steps == 7


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; give .* a shipped one's name: continue-llama, gpt-124m, "):
        load_config(tmp_path / "no.toml")
    with pytest.raises(FileNotFoundError, match=r"is a directory; give the path of a TOML file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"/proc/self/mem cannot be read \(.+\); give the path of a TOML file"):
        load_config("/proc/self/mem")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_micro_batches_follow_from_the_world():
    config = build_config({}, ["train.global_batch_size=32", "train.micro_batch_size=4", "parallel.tensor_parallel_size=2"])
    assert [micro_batches(config, world) for world in (2, 4, 8, 16)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"3 ranks cannot form groups of parallel.tensor_parallel_size = 2"):
        micro_batches(config, 3)
    with pytest.raises(ValueError, match=r"a run has at least 1 rank, got 0; give --nproc 1 or more"):
        micro_batches(config, 0)
    with pytest.raises(ValueError, match=r"is not a multiple of train.micro_batch_size = 4 times 16 data-parallel ranks"):
        micro_batches(config, 32)


def test_home_is_ours_to_fill_in(monkeypatch: pytest.MonkeyPatch):
    """bash hands run.dir=~/x on as it is, and a folder of the name ~ was made."""
    monkeypatch.setenv("HOME", "/home/me")
    config = build_config({}, ["run.dir=~/runs/a", "checkpoint.directory=~/c", "checkpoint.resume=~/runs/b"])
    assert (config.run.dir, config.checkpoint.directory, config.checkpoint.resume) == (
        "/home/me/runs/a", "/home/me/c", "/home/me/runs/b",
    )  # fmt: skip
    assert build_config({}, ["checkpoint.directory=s3://a/~b"]).checkpoint.directory == "s3://a/~b"
