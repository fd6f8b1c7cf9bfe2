"""What no section of a configuration can check alone: values that contradict each other."""

from dataclasses import replace

from data.corpus.validation import check_contexts
from launch.config import RunConfig
from model.config import ModelConfig
from model.feed_forward.grouped import ALIGNMENT_BYTES
from model.flops import stage_bounds
from model.parameters import ParameterSpec
from model.positions.config import PositionConfig
from model.sizes import check_split, parameter_specs
from trainer.config import CheckpointConfig
from trainer.monitoring.progress import plural
from trainer.optimizers.check import check_optimizer
from trainer.optimizers.config import OptimizerConfig


def check_config(config: RunConfig) -> None:
    """What no section can check alone. Whether the sizes of a ramp divide, `micro_batches` checks: some may be of the past.

    Raises:
        ValueError: one sentence.
    """
    check_split(config.model, config.parallel.tensor_parallel_size)
    train = config.train
    given = "global_batch_size" in train.model_fields_set  # left unset it may be a checkpoint's
    if given and train.global_batch_size % train.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by "
            f"train.micro_batch_size = {train.micro_batch_size}; change one of them"
        )
    _check_tokens(config)
    if "sequence_length" in train.model_fields_set:  # left unset it may be a checkpoint's
        check_lengths(config)
    _check_heads(config)
    _check_stages(config)
    _check_experts(config)
    for name, position in (("position", config.position), ("evaluate.position", config.evaluate.position)):
        if position is not None:
            check_position(config, position, f"{name}.")
    check_contexts(config.evaluate.contexts, "evaluate.contexts")
    check_checkpoints(config.checkpoint)
    if not may_select(config) and train.recompute == "selective":
        raise ValueError(
            "train.recompute = 'selective' cannot be used with train.compile = true and parallel.zero_stage = 3: gathering "
            "weights cuts compiled blocks in pieces whose products cannot be kept; use train.recompute=full, or compile=false"
        )
    if train.cuda_graphs:
        _check_cuda_graphs(config)
    check_optimizer(*optimized(config), config.parallel.engine)
    _check_qk_clip(config)


def _check_tokens(config: RunConfig) -> None:
    """Refuse ranks that do not divide the tokens of a micro-batch."""
    train, parallel = config.train, config.parallel
    context, length = parallel.context_parallel_size, train.sequence_length
    if context > 1 and length % (2 * context):
        raise ValueError(
            f"train.sequence_length = {length} is not divisible by the two chunks of each of parallel.context_parallel_size = "
            f"{context} ranks; use a multiple of {2 * context}"
        )
    size, tokens = parallel.tensor_parallel_size, train.micro_batch_size * length // context
    if parallel.sequence_parallel and tokens % size:
        shared = " / context_parallel_size" if context > 1 else ""
        raise ValueError(
            f"sequence_parallel splits micro_batch_size * sequence_length{shared} = "
            f"{plural(tokens, 'token')} over {plural(size, 'rank')}, which does not divide"
        )


def check_lengths(config: RunConfig) -> None:
    """Refuse rows of a ramp that do not make up a sequence, or that ranks or documents do not allow.

    Raises:
        ValueError: one sentence.
    """
    train, context = config.train, config.parallel.context_parallel_size
    if train.length_ramp and config.data.pack == "documents":
        raise ValueError(
            "data.pack = 'documents' cannot be used with train.length_ramp: shorter rows would cut documents that fit into a "
            "sequence; use data.pack=stream, or a run for each length"
        )
    for _, length in train.length_ramp:
        if train.sequence_length % length:
            raise ValueError(
                f"train.length_ramp has {plural(length, 'token')} per row, which does not divide train.sequence_length = "
                f"{train.sequence_length}; change one of them"
            )
        if context > 1 and length % (2 * context):
            raise ValueError(
                f"train.length_ramp has {plural(length, 'token')} per row, which is not divisible by the two chunks of each of "
                f"parallel.context_parallel_size = {context} ranks; use a multiple of {2 * context}"
            )


def _check_stages(config: RunConfig) -> None:
    """Refuse more stages of a pipeline than there are layers."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size > 1:
        stage_bounds(config.model, config.train.sequence_length, parallel.pipeline_stages)


def _check_experts(config: RunConfig) -> None:
    """Refuse ranks that cannot share the experts, and what only experts have in a network without."""
    model, size, recompute = config.model, config.parallel.expert_parallel_size, config.train.recompute
    if not model.layers_with_experts:
        asked = f"parallel.expert_parallel_size = {size}" if size > 1 else "train.recompute = 'experts'"
        if size > 1 or recompute == "experts":
            raise ValueError(
                f"{asked} is for networks with experts, and model.feed_forward = '{model.feed_forward}'; leave it out, or use "
                "model.feed_forward=moe"
            )
    elif model.n_routed_experts % size:
        raise ValueError(
            f"model.n_routed_experts = {model.n_routed_experts} is not divisible by parallel.expert_parallel_size = {size}; "
            "change one of them"
        )


def _check_heads(config: RunConfig) -> None:
    """Refuse heads that context-parallel ranks cannot share where they exchange tokens for heads."""
    parallel, model = config.parallel, config.model
    context, tensor = parallel.context_parallel_size, parallel.tensor_parallel_size
    if context == 1 or parallel.context_exchange != "heads":
        return
    advice = "use context_exchange = 'gather', or change one of them"
    for key, count in (("num_attention_heads", model.num_attention_heads), ("num_key_value_heads", model.kv_heads)):
        own = max(1, count // tensor)
        if own % context and (key == "num_attention_heads" or context % own):
            over = f"{own} of model.{key} = {count} on a tensor-parallel rank" if tensor > 1 else f"model.{key} = {count}"
            raise ValueError(
                f"parallel.context_exchange = 'heads' shares {over} among parallel.context_parallel_size = {context} ranks, "
                f"which does not divide; {advice}"
            )


def check_position(config: RunConfig, position: PositionConfig, prefix: str) -> None:
    """Refuse a position map that means nothing for the network.

    Args:
        position: the map of training or of evaluation.
        prefix: of its keys in a sentence, such as "position.".

    Raises:
        ValueError: one sentence.
    """
    model = config.model
    if position.log_n != "none" and (position.trained_length or config.train.sequence_length) == 1:
        raise ValueError(
            f"{prefix}log_n = '{position.log_n}' divides by the logarithm of the trained length, which is 0 for "
            "train.sequence_length = 1; use 2 or more, or log_n=none"
        )
    acts = any(model.rotated_layer(layer) and not model.full_layer(layer) for layer in range(model.num_hidden_layers))
    if position.windowed_rope_theta is not None and not acts:
        raise ValueError(
            f"{prefix}windowed_rope_theta = {position.windowed_rope_theta} has no layer to act in: no layer is windowed and "
            "has positions; remove it or set model.sliding_window"
        )


def optimized(config: RunConfig) -> tuple[OptimizerConfig, list[tuple[str, str]], bool]:
    """The optimizer, name and kind of every parameter that it moves, and whether the embedding is the head's weight too."""
    parameters = [(name, spec.kind) for name, spec in parameter_specs(config.model).items()]
    return config.optimizer, parameters, config.model.tie_word_embeddings


def check_checkpoints(settings: CheckpointConfig) -> None:
    """Refuse settings that would not do what they say.

    Raises:
        ValueError: one sentence.
    """
    if settings.reset_optimizer and settings.resume in ("auto", "never"):
        raise ValueError(
            f"checkpoint.reset_optimizer = true takes the weights of another run and checkpoint.resume = '{settings.resume}' "
            "names none; give its checkpoint, checkpoint.resume=PATH, or leave reset_optimizer out"
        )
    every, milestones = settings.every_steps, settings.keep_every_steps
    if milestones and (not every or milestones % every):
        raise ValueError(
            f"checkpoint.keep_every_steps = {milestones} keeps checkpoints that checkpoint.every_steps = {every} never makes; "
            "use a multiple of it"
        )


def may_select(config: RunConfig) -> bool:
    """Whether blocks can be recomputed selectively."""
    return not (config.train.compile and config.parallel.engine == "zero" and config.parallel.zero_stage == 3)


def _check_cuda_graphs(config: RunConfig) -> None:
    """Refuse what would read the memory of a CUDA graph too late, or record again and again (docs/speed.md)."""
    for wrong, sentence in (*_cuda_graph_training_limits(config), *_cuda_graph_parallel_limits(config)):
        if wrong:
            raise ValueError(f"train.cuda_graphs = true cannot be used with {sentence}")


def _cuda_graph_training_limits(config: RunConfig) -> list[tuple[bool, str]]:
    """Whether each limit of [train] and [data] is broken, and what it is."""
    train = config.train
    return [
        (not train.compile, "train.compile = false: it replays compiled blocks; use train.compile=true"),
        (
            config.parallel.engine == "zero" and train.precision == "fp32",
            "train.precision = 'fp32' and parallel.engine = 'zero': float32 gradients may stay in memory that the next replay "
            "overwrites; use train.precision=bf16 or parallel.engine=fold",
        ),
        (
            train.recompute != "none",
            f"train.recompute = '{train.recompute}': a recomputed block frees tensors in another order than was recorded; "
            "use train.recompute=none",
        ),
        (
            config.optimizer.qk_clip is not None,
            f"optimizer.qk_clip = {config.optimizer.qk_clip}: largest logits that a replay records were never tried; "
            "use train.cuda_graphs=false",
        ),
        (
            config.data.document_mask,
            "data.document_mask = true: each number of documents would be a recording of its own; use data.document_mask=false",
        ),
        (
            _waits_for_loads(config),
            "model.feed_forward = 'moe' unless train.precision = 'bf16', and model.hidden_size and moe_intermediate_size are "
            "multiples of 8: other products of experts wait for the number of their tokens; use train.cuda_graphs=false",
        ),
        (
            bool(train.length_ramp),
            f"train.length_ramp = {[*map(list, train.length_ramp)]}: recordings of several lengths were never tried; "
            "use train.cuda_graphs=false",
        ),
    ]


def _cuda_graph_parallel_limits(config: RunConfig) -> list[tuple[bool, str]]:
    """Whether each limit of [parallel] is broken, and what it is."""
    parallel, zero = config.parallel, config.parallel.engine == "zero"
    size, (name, matrix) = parallel.tensor_parallel_size, _largest_matrix(config.model)
    return [
        (
            size > 1,
            f"parallel.tensor_parallel_size = {size}: collectives inside a recording were never tried; "
            "use parallel.tensor_parallel_size=1",
        ),
        (
            parallel.context_parallel_size > 1,
            f"parallel.context_parallel_size = {parallel.context_parallel_size}: collectives inside a recording were never "
            "tried; use parallel.context_parallel_size=1",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"parallel.pipeline_parallel_size = {parallel.pipeline_parallel_size}: several micro-batches are in flight, and "
            "each replay overwrites what the one before has kept; use parallel.pipeline_parallel_size=1",
        ),
        (
            zero and parallel.zero_stage == 3,
            "parallel.zero_stage = 3: a replay needs weights that stay where they are; use parallel.zero_stage=1 or 2",
        ),
        (
            parallel.offload != "none",
            f"parallel.offload = '{parallel.offload}': gradients leave for the CPU while the next replay overwrites them; "
            "use parallel.offload=none",
        ),
        (
            zero and matrix.elements > parallel.reduce_bucket_elements,
            f"parallel.reduce_bucket_elements = {parallel.reduce_bucket_elements}: gradients of more elements, such as the "
            f"{matrix.elements} of {name}, are sent while the next replay overwrites them; "
            f"use parallel.reduce_bucket_elements={matrix.elements} or more",
        ),
    ]


def _waits_for_loads(config: RunConfig) -> bool:
    """Whether a GPU's host waits to know how many tokens an expert has (model/feed_forward/grouped.py)."""
    model, aligned = config.model, ALIGNMENT_BYTES // 2
    uneven = model.hidden_size % aligned or model.moe_intermediate_size % aligned
    return bool(model.layers_with_experts and (uneven or config.train.precision != "bf16"))


def _largest_matrix(model: ModelConfig) -> tuple[str, ParameterSpec]:
    """The largest of a block, whose gradients lie in the memory of its CUDA graph; those of embedding and head do not."""
    specs = parameter_specs(model).items()
    inside = [(name, spec) for name, spec in specs if spec.part in ("attention", "mlp")]
    first = [(name, spec) for name, spec in specs if ".experts.0." in name]  # the gradient of a stack of experts is one
    experts = model.n_routed_experts
    inside += [(name.replace(".0.", ".*."), replace(spec, shape=(experts, *spec.shape))) for name, spec in first]
    return max(inside, key=lambda item: item[1].elements)


def _check_qk_clip(config: RunConfig) -> None:
    """Refuse a limit of logits that do not follow the weights, or follow some that no loss holds."""
    limit, model = config.optimizer.qk_clip, config.model
    if limit is None:
        return
    if model.qk_norm != "none":
        raise ValueError(
            f"optimizer.qk_clip = {limit:g} cannot be used with model.qk_norm = '{model.qk_norm}': it makes weights smaller, "
            "and logits of normed queries or keys do not follow them; leave one of them out"
        )
    rotated = [config.position.kind != "none" and model.rotated_layer(layer) for layer in range(model.num_hidden_layers)]
    if model.attention_bias != "none" and not all(rotated):
        raise ValueError(
            f"optimizer.qk_clip = {limit:g} cannot be used with model.attention_bias = '{model.attention_bias}' where layer "
            f"{rotated.index(False)} has no positions: a key's bias adds the same to all logits of a query there, so that no "
            "loss holds it, it drifts, and heads would be clipped for it; leave one of them out"
        )
