"""The table of options: every configuration key that acts on training, with the values that are combined.

A value is a tuple of overrides as a user types them; the first value of an option is its default, to which a failing
configuration is reduced. `{corpus}` stands for the folder of prepared shards, `{store}` for an object store.
"""

import math
from dataclasses import dataclass

BASE = (
    "run.device=cpu",
    "data.tokenizer={corpus}/tokenizer",
    "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.initializer_range=0.1",
    "train.steps=4", "train.sequence_length=64", "train.global_batch_size=8",
    "checkpoint.every_steps=2", "checkpoint.keep=9",
    "evaluate.tokens=0",
    "log.every_steps=1", "log.sample_tokens=8",
)  # fmt: skip
"""The shipped quickstart made small. The weights are large, so that an error in a gradient is not hidden by them."""

MLA = (
    "model.attention=mla", "model.kv_lora_rank=32", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
)  # fmt: skip
MOE = (
    "model.feed_forward=moe", "model.n_routed_experts=6", "model.moe_intermediate_size=32", "model.router_bias_rate=0.02",
)  # fmt: skip
RATES = (
    "optimizer.tiger.learning_rate=2e-3", "optimizer.tiger.beta=0.9",
    "optimizer.lion.learning_rate=2e-4", "optimizer.lion.betas=[0.9,0.95]", "optimizer.adamw.learning_rate=1e-3",
    "optimizer.adamw.betas=[0.85,0.95]", "optimizer.muon.learning_rate=2e-3", "optimizer.muon.beta=0.9",
)  # fmt: skip
"""All of them in every configuration: a section of another rule changes nothing."""


@dataclass(frozen=True)
class Option:
    """One thing a user chooses."""

    name: str
    values: dict[str, tuple[str, ...]]


def _option(name: str, **values: tuple[str, ...]) -> Option:
    return Option(name, {key.strip("_").replace("_", "-"): value for key, value in values.items()})


OPTIONS = (
    # the network
    _option(
        "heads",
        mha=(), gqa=("model.num_key_value_heads=2",), mqa=("model.num_key_value_heads=1",),
        mla=MLA, mla_query_latent=(*MLA, "model.q_lora_rank=24", "model.latent_norm_eps=1e-3"),
    ),
    _option("head width", default=(), own=("model.head_dim=24",)),
    _option(
        "qk norm",
        none=(), rms=("model.qk_norm=rms",), rms_all_heads=("model.qk_norm=rms-all-heads",), key_l2=("model.qk_norm=key-l2",),
    ),
    _option("query scale", default=(), own=("model.query_pre_attn_scalar=12",)),
    _option(
        "attention bias",
        none=(), qkv=("model.attention_bias=qkv",), all=("model.attention_bias=all",),
    ),
    _option("mlp bias", off=(), on=("model.mlp_bias=true",)),
    _option("norms", pre=(), post=("model.norm_placement=post",), sandwich=("model.norm_placement=sandwich",)),
    _option("gains", around_1=(), around_0=("model.zero_centered_gains=true",)),
    _option(
        "feed forward",
        swiglu=(), geglu=("model.feed_forward=geglu",), moe=MOE, moe_2_ranks=(*MOE, "parallel.expert_parallel_size=2"),
        moe_4_ranks=(*MOE, "parallel.expert_parallel_size=4", "model.n_routed_experts=12"),
    ),
    _option(
        "routing",
        deepseek=(),
        mixtral=(
            "model.scoring_func=softmax", "model.router_bias=false", "model.n_shared_experts=0", "model.norm_topk_prob=false",
            "model.router_aux_loss_coef=0.3",
        ),
        groups=("model.n_group=3", "model.topk_group=2", "model.routed_scaling_factor=2.5", "model.n_shared_experts=2"),
        softmax_groups=("model.scoring_func=softmax", "model.n_group=3", "model.topk_group=2", "model.router_z_loss_coef=0.1"),
        losses=("model.router_aux_loss_coef=0.3", "model.router_z_loss_coef=0.1"),
        rms=("model.router_bias_step=rms", "model.router_bias_rate=0.03"),
        still=("model.router_bias_rate=0", "model.num_experts_per_tok=3"),
        dense_first=("model.first_k_dense_replace=1", "model.n_shared_experts=0"),
        one=("model.num_experts_per_tok=1", "model.norm_topk_prob=false"),
    ),
    _option("embedding scale", off=(), on=("model.scale_embedding=true",)),
    _option(
        "windows",
        none=(), all=("model.sliding_window=16",),
        last_full=("model.sliding_window=16", "model.full_attention_layers=[-1]"),
        last_full_unrotated=(
            "model.sliding_window=24", "model.full_attention_layers=[-1]", "model.full_attention_position=none",
        ),
    ),
    _option("layers without positions", none=(), last=("model.layers_without_positions=[-1]",)),
    _option(
        "output head",
        half_swap=(), plain=("model.tied_head=plain",), projection=("model.tied_head=projection",),
        small_init=("model.tied_head=small-init",), untied=("model.tie_word_embeddings=false",),
    ),
    _option(
        "vocabulary",
        as_pieces=("model.vocab_size=512",), padded=("model.vocab_size=640",),
        multiple=("model.vocab_size=512", "model.pad_vocab_to_multiple=96"),
        whole_ranks=("model.vocab_size=512", "model.pad_vocab_to_multiple=1024"),  # of two, the second has padding only
    ),
    _option("residual init", scaled=(), plain=("model.residual_init=plain",), zero=("model.residual_init=zero",)),
    _option("norm eps", default=(), large=("model.rms_norm_eps=1e-3",)),
    _option("seed", _0=(), _3=("run.seed=3",)),
    _option("deterministic", off=(), on=("run.deterministic=true",)),
    # positions
    _option(
        "position",
        rope=(), none=("position.kind=none",), pi=("position.kind=pi", "position.factor=2"),
        ntk=("position.kind=ntk", "position.factor=2"), ntk_mixed=("position.kind=ntk-mixed", "position.factor=4"),
        ntk_mixed_075=("position.kind=ntk-mixed", "position.factor=4", "position.mixed_exponent=0.75"),
        yarn=("position.kind=yarn", "position.factor=4"),
        yarn_index=("position.kind=yarn", "position.factor=4", "position.yarn_ramp=index"),
        yarn_all_keys=(
            "position.kind=yarn", "position.factor=4", "position.yarn_ramp=index", "position.yarn_truncate=false",
            "position.beta_fast=8", "position.beta_slow=0.5", "position.attention_factor=1.3", "position.rotated_factor=0.8",
        ),
        llama3=("position.kind=llama3", "position.factor=4"),
        llama3_own_factors=(
            "position.kind=llama3", "position.factor=4", "position.low_freq_factor=2", "position.high_freq_factor=3",
        ),
        rerope=("position.kind=rerope", "position.window=20"),
        leaky_rerope=("position.kind=leaky-rerope", "position.window=20", "position.leak=8"),
        inverse_leaky_rerope=("position.kind=leaky-rerope", "position.window=20", "position.leak=0.5"),
    ),
    _option("theta", default=(), small=("position.rope_theta=500",)),
    _option("windowed theta", same=(), small=("position.windowed_rope_theta=50",)),
    _option("trained length", default=(), shorter=("position.trained_length=32",)),
    _option("log n", none=(), trained=("position.log_n=trained",), inference=("position.log_n=inference",)),
    # data
    _option(
        "corpora",
        one=("data.train={corpus}/shards/train",),
        mixture=('data.train=[{{path="{corpus}/shards/train",weight=3}},{{path="{corpus}/more/train",weight=1}}]',),
        curriculum=(
            "data.train={corpus}/more/train",
            'data.curriculum=[{{from_step=2,sources=[{{path="{corpus}/shards/train"}}]}}]',
        ),
    ),
    _option("packing", stream=(), documents=("data.pack=documents",)),
    _option("document mask", off=(), on=("data.document_mask=true",)),
    _option("prefetch", _2=(), _0=("data.prefetch_steps=0",)),
    _option(
        "micro-batch",
        _2=("train.micro_batch_size=2",), _1=("train.micro_batch_size=1",), _4=("train.micro_batch_size=4",),
    ),
    _option("batch ramp", none=(), doubling=("train.global_batch_size=16", "train.batch_ramp=[[2,8]]")),
    _option("length ramp", none=(), doubling=("train.length_ramp=[[2,32]]",)),
    # the update
    _option(
        "optimizer",
        tiger=(*RATES, "optimizer.name=tiger"), lion=(*RATES, "optimizer.name=lion"), adamw=(*RATES, "optimizer.name=adamw"),
        muon=(*RATES, "optimizer.name=muon"),
    ),
    _option(
        "muon",
        nesterov=(), momentum=("optimizer.muon.nesterov=false", "optimizer.muon.others=tiger"),
        polar_express=(
            "optimizer.muon.newton_schulz=polar-express", "optimizer.muon.newton_schulz_steps=7",
            "optimizer.muon.scale=original", "optimizer.muon.others=lion",
        ),
        classical=(
            "optimizer.muon.newton_schulz=classical", "optimizer.muon.precision=fp32", "optimizer.muon.scale=mup",
            "optimizer.muon.nesterov=false", "optimizer.muon.others=tiger",
        ),
        unscaled=("optimizer.muon.scale=none", "optimizer.muon.learning_rate=2e-2"),
    ),
    _option(
        "embedding",
        plain=(), seen=("optimizer.rules.embedding.rows=seen",), tiger=("optimizer.rules.embedding.rule=tiger",),
        adamw=("optimizer.rules.embedding.rule=adamw", "optimizer.rules.embedding.weight_decay=0"),
    ),
    _option("embedding rms", matrix=(), row=("optimizer.tiger.embedding_rms=row",)),
    _option(
        "embedding rate",
        default=(), own=("optimizer.rules.embedding.learning_rate=3e-3", "optimizer.rules.embedding.weight_decay=0.1"),
    ),
    _option(
        "weight decay",
        default=(),
        none=tuple(f"optimizer.{rule}.weight_decay=0" for rule in ("tiger", "lion", "adamw", "muon")),
        large=tuple(f"optimizer.{rule}.weight_decay=0.5" for rule in ("tiger", "lion", "adamw", "muon")),
    ),
    _option(
        "rule of gains",
        same=(), others=('optimizer.rules."model.layers.1.*norm*".rule=adamw', "optimizer.rules.gain.rule=lion"),
    ),
    _option("adamw eps", default=(), large=("optimizer.adamw.eps=1e-4",)),
    _option("rms floor", default=(), own=("optimizer.tiger.rms_floor=0.12",)),
    _option(
        "clipping",
        default=(), off=("optimizer.max_grad_norm=0",), tight=("optimizer.max_grad_norm=0.25",),
    ),
    _option("qk clip", off=(), on=("optimizer.qk_clip=4.5",), small=("optimizer.qk_clip=3.2",)),
    _option("non finite rule", skip=(), shrink=("optimizer.tiger.non_finite=shrink",)),
    _option("rounding", stochastic=(), nearest=("optimizer.rounding=nearest",)),
    _option(
        "schedule",
        cosine=("schedule.warmup_steps=2",), constant=("schedule.kind=constant", "schedule.warmup_steps=0"),
        linear=("schedule.kind=linear", "schedule.warmup_steps=1", "schedule.final_fraction=0"),
        linear_short=("schedule.kind=linear", "schedule.warmup_steps=0", "schedule.decay_steps=2"),
        warmup_stable_decay=("schedule.kind=warmup-stable-decay", "schedule.warmup_steps=1", "schedule.decay_steps=2"),
        piecewise=("schedule.kind=piecewise", "schedule.points=[[1,0.5],[3,1.0],[4,0.25]]"),
    ),
    # numbers and layout
    _option("precision", fp32=("train.precision=fp32",), bf16=("train.precision=bf16",)),
    _option("compile", off=(), on=("train.compile=true",), optimizer_only=("optimizer.compile=true",)),
    _option(
        "recompute",
        none=(), experts=("train.recompute=experts",), selective=("train.recompute=selective",), full=("train.recompute=full",),
        auto=("train.recompute=auto",),
    ),
    _option(
        "tensor parallel",
        _1=(), _2=("parallel.tensor_parallel_size=2",),
        _2_sequence=("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"),
    ),
    _option(
        "context parallel",
        _1=(), _2=("parallel.context_parallel_size=2",),
        _2_heads=("parallel.context_parallel_size=2", "parallel.context_exchange=heads"),
        _4=("parallel.context_parallel_size=4",),
        _4_heads=("parallel.context_parallel_size=4", "parallel.context_exchange=heads"),
    ),
    _option(
        "pipeline parallel",
        _1=(), _2=("parallel.pipeline_parallel_size=2",),
        _2_interleaved=(
            "parallel.pipeline_parallel_size=2", "parallel.pipeline_schedule=interleaved", "model.num_hidden_layers=5",
        ),
        _2_three_each=(
            "parallel.pipeline_parallel_size=2", "parallel.pipeline_schedule=interleaved",
            "parallel.pipeline_stages_per_rank=3", "model.num_hidden_layers=6",
        ),
        _4=("parallel.pipeline_parallel_size=4", "model.num_hidden_layers=5"),
        _4_interleaved=(
            "parallel.pipeline_parallel_size=4", "parallel.pipeline_schedule=interleaved", "model.num_hidden_layers=8",
        ),
    ),
    _option("data ranks", _1=(), _2=()),
    _option(
        "engine",
        zero_1=("parallel.zero_stage=1",), zero_2=("parallel.zero_stage=2",), zero_3=("parallel.zero_stage=3",),
        zero_3_hpz=("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=2"), fold=("parallel.engine=fold",),
    ),
    _option("offload", none=(), cpu=("parallel.offload=cpu",)),
    _option("bucket", default=(), small=("parallel.reduce_bucket_elements=4999",)),
    # what happens beside training
    _option("saving", asynchronous=(), waiting=("checkpoint.asynchronous=false",)),
    _option("store", disk=(), objects=("checkpoint.directory={store}",)),
    _option(
        "evaluation",
        last=("data.validation={corpus}/held-out/train",),
        every_2=("data.validation={corpus}/held-out/train", "evaluate.every_steps=2"),
        none=("data.validation=",),
    ),
    _option(
        "contexts",
        none=(), short=("evaluate.contexts=[33,64]",), longer=("evaluate.contexts=[16,100]",),
        long=("evaluate.contexts=[16,100]", "evaluate.chunk_tokens=24"),
    ),
    _option(
        "evaluate with",
        trained=(), rerope=('evaluate.position={{kind="rerope",window=24}}',),
        ntk=('evaluate.position={{kind="ntk",factor=2.0}}',),
    ),
    _option("sample", none=("log.sample_prompt=",), text=("log.sample_prompt=def ",)),
    _option("attention diagnostics", off=(), every_2=("log.attention_every_steps=2",)),
    _option("spectrum diagnostics", off=(), every_2=("log.spectrum_every_steps=2",)),
    _option("replica check", off=(), every_2=("health.replica_check_every_steps=2",)),
    _option(
        "spikes",
        off=(), record=("health.spike_sigmas=1e9", "health.spike_window_steps=2"),
        skip=("health.spike_sigmas=1e9", "health.spike_window_steps=2", "health.spike_action=skip"),
        rewind=("health.spike_sigmas=1e9", "health.spike_window_steps=2", "health.spike_action=rewind"),
    ),
    _option("profile", off=(), on=("profile.start_step=1", "profile.steps=2")),
    _option("tensorboard", off=("log.tensorboard=false",), on=("log.tensorboard=true",)),
)  # fmt: skip

EXEMPT = {
    "run.dir": "each configuration has its own",
    "run.device": "the same table on a GPU needs one",
    "model.hidden_size": "a size of the small shape",
    "model.intermediate_size": "a size of the small shape",
    "model.num_hidden_layers": "a size of the small shape",
    "model.num_attention_heads": "a size of the small shape",
    "model.initializer_range": "0.1, so that errors show",
    "train.steps": "four, so that there is a middle to resume from",
    "train.sequence_length": "a size of the small shape",
    "train.global_batch_size": "a size of the small shape",
    "train.cuda_graphs": "refused on a CPU; tests/test_cuda_graphs.py has its refusals",
    "checkpoint.every_steps": "two, so that there is a middle to resume from",
    "checkpoint.keep": "what is removed acts on nothing",
    "checkpoint.keep_every_steps": "what is removed acts on nothing",
    "checkpoint.resume": "each configuration is resumed",
    "checkpoint.reset_optimizer": "starts another run; tests/launch/test_train.py",
    "checkpoint.max_failures": "acts where saves fail; tests/trainer/checkpoint/test_writer.py",
    "evaluate.tokens": "all of the held-out text, in every configuration",
    "log.sample_tokens": "few, for time",
    "log.every_steps": "one, so that every step is compared",
    "log.tracker": "needs an account; tests/trainer/monitoring/test_weights_and_biases.py",
    "log.project": "of a tracker",
    "health.max_skipped_steps": "acts where steps are skipped; tests/trainer/monitoring/test_health.py",
    "health.hang_seconds": "acts where a step hangs; tests/trainer/monitoring/test_watchdog.py",
    "health.grace_seconds": "acts after a stop signal; tests/launch/test_survive.py",
    "parallel.timeout_seconds": "acts where a rank is lost; tests/launch/test_survive.py",
}
"""Keys that are not combined, each with the reason."""

Choice = dict[str, str]
"""The name of an option -> the name of its value."""


def default() -> Choice:
    """The first value of everything."""
    return {option.name: next(iter(option.values)) for option in OPTIONS}


def overrides(choice: Choice) -> list[str]:
    """What a user would type after the shipped quickstart, places not yet filled in."""
    return [*BASE, *(text for option in OPTIONS for text in option.values[choice[option.name]])]


def ranks(choice: Choice) -> int:
    """Processes of a whole or partial choice."""
    sizes = (choice.get(name, "1")[0] for name in ("tensor parallel", "context parallel", "pipeline parallel", "data ranks"))
    return math.prod(map(int, sizes))


def keys() -> set[str]:
    """Every configuration key that some value sets; the lines of [optimizer.rules] are one key."""
    texts = [text for option in OPTIONS for value in option.values.values() for text in value]
    found = {text.partition("=")[0] for text in [*BASE, *texts]}
    return {"optimizer.rules" if key.startswith("optimizer.rules.") else key for key in found}
