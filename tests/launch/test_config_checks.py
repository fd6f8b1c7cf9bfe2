import re

import pytest

from launch.load_config import build_config


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["parallel.tensor_parallel_size=3"],
            "model.vocab_size = 4096 is not divisible by parallel.tensor_parallel_size = 3",
        ),
        (["train.global_batch_size=9"], "train.global_batch_size = 9 is not divisible by train.micro_batch_size = 8"),
        (["train.sequence_length=1", "position.log_n=trained"], "position.log_n = 'trained' divides by the logarithm"),
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
        (
            ["optimizer.rules.embedding.rows=seen"],
            "rows = 'seen' cannot be used with model.tie_word_embeddings = true",
        ),
        (["parallel.engine=fold", "optimizer.name=lion"], "parallel.engine = 'fold' cannot run optimizer.name = 'lion'"),
        (["parallel.engine=fold", "optimizer.max_grad_norm=1"], "parallel.engine = 'fold' cannot clip"),
        (
            ["parallel.context_parallel_size=3", "train.sequence_length=256"],
            "train.sequence_length = 256 is not divisible by the two chunks of each of parallel.context_parallel_size = 3 "
            "ranks; use a multiple of 6",
        ),
        (
            [
                "parallel.context_parallel_size=4",
                "parallel.tensor_parallel_size=4",
                "parallel.sequence_parallel=true",
                "train.sequence_length=8",
                "train.micro_batch_size=1",
            ],
            "sequence_parallel splits micro_batch_size * sequence_length / context_parallel_size = 2 tokens over 4 ranks",
        ),
        (
            ["parallel.pipeline_parallel_size=3", "parallel.pipeline_schedule=interleaved", "model.num_hidden_layers=4"],
            "model.num_hidden_layers = 4 cannot be cut into 6 pipeline stages; use at most 4",
        ),
        (
            ["parallel.context_parallel_size=8", "parallel.context_exchange=heads"],
            "parallel.context_exchange = 'heads' shares model.num_attention_heads = 4 among parallel.context_parallel_size = 8 "
            "ranks, which does not divide; use context_exchange = 'gather', or change one of them",
        ),
        (
            [
                "parallel.context_parallel_size=4",
                "parallel.context_exchange=heads",
                "model.num_attention_heads=12",
                "model.num_key_value_heads=6",
                "model.hidden_size=96",
            ],
            "shares model.num_key_value_heads = 6 among parallel.context_parallel_size = 4 ranks, which does not divide",
        ),
        (
            [
                "parallel.context_parallel_size=4",
                "parallel.tensor_parallel_size=2",
                "parallel.context_exchange=heads",
            ],
            "shares 2 of model.num_attention_heads = 4 on a tensor-parallel rank among parallel.context_parallel_size = 4",
        ),
        (
            ["train.sequence_length=256", "train.length_ramp=[[5,64],[9,96]]"],
            "train.length_ramp has 96 tokens per row, which does not divide train.sequence_length = 256; change one of them",
        ),
        (
            ["train.sequence_length=256", "train.length_ramp=[[5,4]]", "parallel.context_parallel_size=4"],
            "train.length_ramp has 4 tokens per row, which is not divisible by the two chunks of each of "
            "parallel.context_parallel_size = 4 ranks; use a multiple of 8",
        ),
        (
            ["parallel.expert_parallel_size=2"],
            "parallel.expert_parallel_size = 2 is for networks with experts, and model.feed_forward = 'swiglu'; leave it out",
        ),
        (
            ["train.recompute=experts"],
            "train.recompute = 'experts' is for networks with experts, and model.feed_forward = 'swiglu'; leave it out",
        ),
        (
            ["model.feed_forward=moe", "model.n_routed_experts=6", "parallel.expert_parallel_size=4"],
            "model.n_routed_experts = 6 is not divisible by parallel.expert_parallel_size = 4; change one of them",
        ),
        (
            ["model.feed_forward=moe", "parallel.expert_parallel_size=2", "parallel.zero_stage=3"],
            "expert_parallel_size = 2 cannot be used with zero_stage = 3: DeepSpeed would cut experts for ranks that do not "
            "have them; use zero_stage = 1 or 2, or engine = 'fold'",
        ),
        (
            ["model.feed_forward=moe", "parallel.expert_parallel_size=2", "parallel.offload=cpu"],
            "expert_parallel_size = 2 cannot be used with offload = 'cpu': gradients of experts are summed on the device",
        ),
        (
            ["train.sequence_length=256", "train.length_ramp=[[5,64]]", "data.pack=documents"],
            "data.pack = 'documents' cannot be used with train.length_ramp",
        ),
    ],
)
def test_values_that_contradict_each_other_are_one_sentence(overrides: list[str], wanted: str):
    with pytest.raises(ValueError) as caught:
        build_config({}, overrides)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


GRAPHS = ["train.cuda_graphs=true", "train.compile=true"]


@pytest.mark.parametrize(
    "odd", ["model.moe_intermediate_size=252", "train.precision=fp32", "parallel.reduce_bucket_elements=1000"]
)
def test_cuda_graphs_of_experts_need_products_in_one_launch(odd: str):
    experts = [*GRAPHS, "model.feed_forward=moe", "parallel.engine=fold"]
    assert build_config({}, experts).train.cuda_graphs
    zero = "parallel.engine=zero" if odd.startswith("parallel") else "parallel.engine=fold"
    wanted = r"experts\.\*\.gate_proj" if odd.startswith("parallel") else "wait for the number of their tokens"
    with pytest.raises(ValueError, match=wanted):
        build_config({}, [*experts, zero, odd])


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["train.compile=false"], "train.compile = false: it replays compiled blocks; use train.compile=true"),
        (["train.precision=fp32"], "train.precision = 'fp32' and parallel.engine = 'zero'"),
        (["train.recompute=full"], "train.recompute = 'full'"),
        (["train.recompute=auto"], "train.recompute = 'auto'"),
        (["data.document_mask=true"], "data.document_mask = true"),
        (["train.length_ramp=[[5,64]]"], "train.length_ramp = [[5, 64]]"),
        (["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size = 2"),
        (["parallel.context_parallel_size=2"], "parallel.context_parallel_size = 2"),
        (["parallel.pipeline_parallel_size=2"], "parallel.pipeline_parallel_size = 2: several micro-batches are in flight"),
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
