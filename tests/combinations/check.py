"""What must hold of one configuration: it is refused as the list says, or it trains as the reference does and resumes."""

import itertools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.corpus.stream import Stream
from data.storage import join_address
from launch.checkpoints import load_checkpoint, tensor_names
from launch.config import RunConfig
from launch.inputs import batch_shape
from tests.combinations import held_out
from tests.combinations import loop as reference
from tests.combinations.network import Batch, cast
from tests.combinations.options import Choice, overrides, ranks
from tests.combinations.refusals import Refusal, refused
from tests.combinations.run import Ending, Place, configuration, execute
from tests.combinations.weights import initial_weights, router_biases
from trainer.checkpoint.rectangles import Shard
from trainer.monitoring.records import read_records
from trainer.state import due

CLOSE = 1e-5
"""Relative difference of losses, norms, rates and weights (their norms) from the reference, in float32."""
FLIPPED = {"fp32": (1, 1e-3), "bf16": (4, 1e-2)}
"""Elements at least, and share of a tensor's, that may have stepped the other way once: a sign update of a momentum that is
zero but for rounding goes either way. Gains of 64 elements have been seen with three in bfloat16, or with one that did so
twice, which counts as four, where plain torch had none."""
ROUNDING = 3.0
"""Times the error that plain torch has at that precision, in bfloat16 at the worst of the steps."""
FACTOR = {"loss": 5e-4, "held-out loss": 1e-3, "gradient norm": 2**-8, "bound of logits": 2**-8}
"""In bfloat16: relative difference that a fortunate plain run may not have had. Tensor-parallel ranks round partial sums, each
by up to 2^-9, and the norm of few tokens' gradients shows it; a mean over tokens does not."""
DRAWN = 8
"""Runs that show what rounding may do where it is in doubt."""
STEPS, MIDDLE = 4, 2
FINAL = "final "
Measures = dict[str, Any]
"""What is compared, by a name that a reader understands: numbers, and weights."""
_COUNT = itertools.count()


def check(choice: Choice, place: Place, name: str) -> str:
    """What is wrong with a configuration; empty if nothing."""
    if refusals := refused(choice):
        return check_refused(choice, refusals, place, name)
    asked, name = overrides(choice), f"{name}-{next(_COUNT)}"  # an object store keeps what has been saved under a name
    try:
        plain = _trains(asked, choice, place, f"{name}-fp32", "fp32")
        if plain or choice["precision"] == "fp32":
            return plain or _resumes(asked, choice, place, f"{name}-fp32")
        return _trains(asked, choice, place, f"{name}-bf16", "bf16") or _resumes(asked, choice, place, f"{name}-bf16")
    finally:
        for left in place.runs.glob(f"{name}-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def check_refused(choice: Choice, refusals: Sequence[Refusal], place: Place, name: str) -> str:
    """A refused configuration gives status 2, one of the sentences, and leaves nothing."""
    ending = execute(place.fill(overrides(choice), name), ranks(choice))
    if ending.statuses != [2] * ranks(choice):
        return f"was to be refused ({refusals[0].words}), but: {ending.fault() or 'it trained'}"
    if ending.directory.exists():
        return f"was refused, but left {ending.directory}"
    if not any(refusal.words in ending.screen for refusal in refusals) or ending.screen.count("\n") != 1:
        return f"was to be refused with '{refusals[0].words}', but the screen says: {ending.screen}"
    return ""


def _trains(asked: list[str], choice: Choice, place: Place, name: str, precision: str) -> str:
    filled = place.fill([*asked, f"train.precision={precision}"], name)
    ending = execute(filled, ranks(choice))
    if fault := ending.fault():
        return f"{precision}: it ended with {fault}"
    config = configuration(filled)
    data_ranks = int(choice["data ranks"])
    got, (want, stepped) = measured(ending, config), _reference(config, data_ranks, torch.float64)
    if got.keys() != want.keys():
        return f"{precision}: recorded {sorted(got.keys() ^ want.keys())} too little or too much"
    narrow = want if precision == "fp32" else _reference(config, data_ranks, torch.bfloat16)[0]
    allowed = {key: _allowance(key, want, narrow, stepped, precision) for key in want}
    left_out = _without_effect(config) | _of_parts(config)

    def wrong() -> list[str]:  # in the order of the steps: the first is nearest to the cause
        return [
            f"{key}: off by {_error(got, want, key):.3g}, allowed {allowed[key]:.3g}"
            for key in want
            if key not in left_out and not _error(got, want, key) <= allowed[key]
        ]

    if wrong():
        for key, error in _sensitivity(config, data_ranks, want, precision).items():
            allowed[key] += error
    return f"{precision}: {'; '.join(found[:6])}" if (found := wrong()) else ""


def _sensitivity(config: RunConfig, data_ranks: int, want: Measures, precision: str) -> dict[str, float]:
    """How far rounding can move what hangs on a comparison that it decides.

    In float32 errors of the gradients move numbers, hardly, unless an element lies so near to zero that it steps the other way.
    In bfloat16 more elements do, and a token whose chosen experts are hardly better than others goes elsewhere.
    """
    dtype, kind = (torch.float64, "rounding") if precision == "fp32" else (torch.bfloat16, "neighbours")
    drawn = [_reference(config, data_ranks, dtype, **{kind: torch.Generator().manual_seed(seed)})[0] for seed in range(DRAWN)]
    farthest = {key: max(_error(one, want, key) for one in drawn) for key in want}
    if precision == "bf16":
        return farthest
    return {key: ROUNDING * error for key, error in farthest.items() if not isinstance(want[key], Tensor)}


def _without_effect(config: RunConfig) -> set[str]:
    """Weights that change no loss: what the biases of keys add to all scores of a query is the same where nothing rotates them.
    Their gradient is zero but for rounding, and sign updates and AdamW make whole steps of that."""
    model = config.model
    if model.attention != "gqa" or model.attention_bias == "none" or model.qk_norm != "none":
        return set()
    still = [layer for layer in range(model.num_hidden_layers) if not model.rotated_layer(layer)]
    layers = range(model.num_hidden_layers) if config.position.kind == "none" else still
    return {f"{FINAL}model.layers.{layer}.self_attn.k_proj.bias" for layer in layers}


def _of_parts(config: RunConfig) -> set[str]:
    """Norms of fold that depend on the layout: of what each context-parallel rank has of a micro-batch's gradient, which no
    whole sequence knows (tests/trainer/engines/test_fold.py adds it up from the ranks' gradients), and of a tied embedding
    whose two gradients are made on two ranks (tests/trainer/engines/test_fold_pipeline.py), and of experts, whose gradients are
    of several ranks' micro-batches (tests/trainer/engines/test_expert_masters.py)."""
    parallel, tied = config.parallel, config.model.tie_word_embeddings
    parts = parallel.context_parallel_size > 1 or (parallel.pipeline_parallel_size > 1 and tied)
    parts = parts or parallel.expert_parallel_size > 1
    return {f"gradient norm of step {step}" for step in range(1, STEPS + 1)} if parallel.engine == "fold" and parts else set()


def _error(got: Measures, want: Measures, key: str) -> float:
    if isinstance(want[key], Tensor):
        return (got[key].double() - want[key].double()).norm().item()
    return abs(got[key] - want[key])


def _allowance(key: str, want: Measures, narrow: Measures, stepped: dict[str, float], precision: str) -> float:
    """Largest error of a number, or norm of the error of a tensor."""
    value = want[key]
    if isinstance(value, Tensor):
        least, share = FLIPPED[precision]
        flips = 2 * stepped[key.removeprefix(FINAL)] * math.sqrt(max(least, share * value.numel()))
        return CLOSE * value.norm().item() + flips + ROUNDING * _error(narrow, want, key)
    if precision == "fp32" or key.startswith("rate"):
        return CLOSE * abs(value)
    kind = key.partition(" of step ")[0]
    plain = max(_error(narrow, want, other) for other in want if other.startswith(kind))
    return FACTOR[kind.partition(" in context ")[0]] * abs(value) + ROUNDING * plain


def _reference(
    config: RunConfig, data_ranks: int, dtype: torch.dtype, **drawn: torch.Generator
) -> tuple[Measures, dict[str, float]]:
    """What plain torch comes to, the truth in float64 or what its own rounding does in bfloat16 (`drawn` is loop.train's:
    errors as each precision makes them), and the largest step that an element of each tensor took."""
    stream = _stream(config, "train")
    found: Measures = {}
    state, weights = None, {name: tensor.double() for name, tensor in (initial_weights(config) | router_biases(config)).items()}
    stepped = dict.fromkeys(weights, 0.0)
    for step in range(1, STEPS + 1):
        result = reference.train(
            config, lambda n: _batches(stream, n), 1, dtype=dtype, data_ranks=data_ranks, first=step - 1, state=state,
            **drawn,
        )  # fmt: skip
        (record,), state, before, weights = result.records, result.state, weights, result.weights
        found[f"loss of step {step}"] = record.loss
        found[f"gradient norm of step {step}"] = record.grad_norm
        found[f"rate of step {step}"] = record.learning_rate
        if config.optimizer.qk_clip:
            found[f"bound of logits of step {step}"] = record.logit_bound
        for name, tensor in weights.items():
            stepped[name] = max(stepped[name], (tensor.double() - before[name].double()).abs().max().item())
        if config.data.validation and (step == STEPS or due(step, config.evaluate.every_steps)):
            scored = held_out.losses(config, cast(weights, dtype))
            found |= {f"{name} of step {step}": loss for name, loss in scored.items()}
    stream.close()
    return found | {f"{FINAL}{name}": tensor for name, tensor in weights.items()}, stepped


def _stream(config: RunConfig, part: Any) -> Stream:
    data = config.data.model_copy(update={"prefetch_steps": 0})
    return Stream(data, part, batch_shape(config.train), 0, 1, config.run.seed)


def _batches(stream: Stream, n: int) -> list[Batch]:
    return [(batch.inputs_BS, batch.targets_BS, batch.cu_seqlens) for batch in stream.batches(n)]


def measured(ending: Ending, config: RunConfig) -> Measures:
    """What a run recorded, and its last weights."""
    found: Measures = {}
    for record in read_records(ending.directory / "metrics.jsonl"):
        if record["kind"] == "train":
            step = record["step"]
            found[f"loss of step {step}"] = record["loss"]
            found[f"gradient norm of step {step}"] = record["grad_norm"]
            found[f"rate of step {step}"] = record["learning_rate"]
            if "logit_bound" in record:
                found[f"bound of logits of step {step}"] = record["logit_bound"]
        elif record["kind"] == "evaluate":
            where = f" in context {record['context']}" if record["name"] == "contexts" else ""
            found[f"held-out loss{where} of step {record['step']}"] = record["loss"]
    saved = _saved(ending.directory, config, "weight/")
    return found | {FINAL + name.removeprefix("weight/"): tensor for name, tensor in saved.items()}


def _saved(directory: Path, config: RunConfig, prefix: str = "") -> dict[str, Tensor]:
    """What the last checkpoint of a run holds, by name: each file is opened once, for all tensors."""
    address = join_address(config.checkpoint.directory or str(directory / "checkpoints"), f"step-{STEPS:08d}")
    tensors = {name: of for name, of in tensor_names(address).items() if name.startswith(prefix)}
    kept = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    load_checkpoint(address, [Shard(name, t.shape, t.shape, (0,) * t.dim(), 0, t.view(-1)) for name, t in kept.items()])
    return kept


def _resumes(asked: list[str], choice: Choice, place: Place, name: str) -> str:
    """From the checkpoint in the middle, in another directory: the same bits."""
    whole = configuration(place.fill(asked, name))
    middle = join_address(whole.checkpoint.directory or f"{whole.run.dir}/checkpoints", f"step-{MIDDLE:08d}")
    again = f"{name}-again"
    ending = execute(place.fill([*asked, f"checkpoint.resume={middle}"], again), ranks(choice))
    if fault := ending.fault():
        return f"resumed from its middle it ended with {fault}"
    config = configuration(place.fill(asked, again))
    one, other = _saved(place.runs / name, whole), _saved(ending.directory, config)
    if {key: (t.shape, t.dtype) for key, t in one.items()} != {key: (t.shape, t.dtype) for key, t in other.items()}:
        return "resumed from its middle it saved other tensors"
    for key, tensor in one.items():
        if not tensor.equal(other[key]):
            return f"resumed from its middle, {key} has other bits"
    before = [r for r in _train_records(place.runs / name) if r["step"] > MIDDLE]
    if [_numbers(r) for r in before] != [_numbers(r) for r in _train_records(place.runs / again)]:
        return "resumed from its middle it recorded other losses or norms"
    return ""


def _train_records(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(directory / "metrics.jsonl") if record["kind"] == "train"]


def _numbers(record: dict[str, Any]) -> tuple[Any, ...]:
    logits = [record[key] for key in ("logit_bound", "heads_clipped") if key in record]
    return *(record[key] for key in ("step", "tokens", "loss", "grad_norm", "learning_rate")), *logits
