"""Values that tiglon refuses together, each with words of its sentence. A new refusal is a decision, made here."""

from dataclasses import dataclass
from itertools import product

from tests.combinations.options import Choice


@dataclass(frozen=True)
class Refusal:
    """Values that cannot stand together."""

    values: tuple[tuple[str, str], ...]
    """(option, value) pairs, two as a rule."""
    words: str
    """Part of the sentence that says so."""


def _each(words: str, **options: tuple[str, ...]) -> list[Refusal]:
    """Every combination of one value of each option, whose underscores stand for spaces."""
    names = [name.replace("_", " ") for name in options]
    return [Refusal(tuple(zip(names, values, strict=True)), words) for values in product(*options.values())]


def _too_few(words: str, stages: tuple[str, ...], data_ranks: str) -> list[Refusal]:
    """Large micro-batches, fewer than a pipeline of these stages needs."""
    alike = (("micro-batch", "4"), ("data ranks", data_ranks))
    return [Refusal((("pipeline parallel", each), *alike), words) for each in stages]


TIED = ("half-swap", "plain", "projection", "small-init")
LATENT = ("mla", "mla-query-latent")
NOT_TIGER = ("lion", "adamw")
SPLIT = ("moe-2-ranks", "moe-4-ranks")
STAGES = ("2", "2-interleaved", "2-three-each", "4", "4-interleaved")

REFUSALS = (
    *_each("cannot be used with attention = 'mla'", heads=LATENT, qk_norm=("rms", "rms-all-heads", "key-l2")),
    *_each("cannot be used with attention = 'mla'", heads=LATENT, attention_bias=("qkv", "all")),
    *_each("cannot be used with attention = 'mla'", heads=LATENT, query_scale=("own",)),
    *_each("whose experts have no biases", feed_forward=("moe", *SPLIT), mlp_bias=("on",)),
    *_each("whose scores are not divided", qk_norm=("key-l2",), query_scale=("own",)),
    *_each("do not follow them", qk_clip=("on", "small"), qk_norm=("rms", "rms-all-heads", "key-l2")),
    *_each("no loss holds it", qk_clip=("on", "small"), attention_bias=("qkv", "all"), layers_without_positions=("last",)),
    *_each("no loss holds it", qk_clip=("on", "small"), attention_bias=("qkv", "all"), windows=("last-full-unrotated",)),
    *_each("no loss holds it", qk_clip=("on", "small"), attention_bias=("qkv", "all"), position=("none",)),
    *_each("no layer is windowed and has positions", windowed_theta=("small",), windows=("none",)),
    *_each("'seen' cannot be used with model.tie_word_embeddings", embedding=("seen",), output_head=TIED),
    *_each("scales Tiger's rate of the embedding", embedding_rms=("row",), embedding=("adamw",), optimizer=("tiger",)),
    *_each(
        "scales Tiger's rate of the embedding",
        embedding_rms=("row",), embedding=("adamw",), optimizer=("muon",), muon=("momentum", "classical"),
    ),
    *_each("'fold' cannot run optimizer.", engine=("fold",), optimizer=NOT_TIGER),
    *_each(
        "'fold' cannot run optimizer.",
        engine=("fold",), optimizer=("muon",), muon=("nesterov", "polar-express", "unscaled"),
    ),
    *_each("'fold' cannot run optimizer.", engine=("fold",), embedding=("adamw",)),
    *_each("'fold' cannot run optimizer.", engine=("fold",), rule_of_gains=("others",)),
    *_each("cannot clip", engine=("fold",), clipping=("tight",)),
    *_each("cannot be used with zero_stage = 3", pipeline_parallel=STAGES, engine=("zero-3", "zero-3-hpz")),
    *_each("gradients are summed on the device", pipeline_parallel=STAGES, offload=("cpu",)),
    *_too_few("is 1 micro-batch per rank", STAGES[:3], "2"),
    *_too_few("is 2 micro-batches per rank", STAGES[3:], "1"),
    *_each("is for networks with experts", recompute=("experts",), feed_forward=("swiglu", "geglu")),
    *_each("is for networks with experts", recompute=("experts",), mlp_bias=("on",)),  # which no network with experts has
    *_each("cannot be used with zero_stage = 3", feed_forward=SPLIT, engine=("zero-3", "zero-3-hpz")),
    *_each("of experts are summed on the device", feed_forward=SPLIT, offload=("cpu",)),
    *_each("does not divide the", feed_forward=SPLIT, data_ranks=("1",), context_parallel=("1",)),
    *_each("does not divide the", feed_forward=SPLIT[1:], data_ranks=("1",), context_parallel=("2", "2-heads")),
    *_each("does not divide the", feed_forward=SPLIT[1:], data_ranks=("2",), context_parallel=("1",)),
    *_each("has no optimizer state to offload", engine=("fold",), offload=("cpu",)),
    *_each("does not divide 1 data-parallel rank;", engine=("zero-3-hpz",), data_ranks=("1",), context_parallel=("1",)),
    *_each("cannot be used with train.length_ramp", packing=("documents",), length_ramp=("doubling",)),
    *_each(
        "cannot be used with train.compile = true and parallel.zero_stage = 3",
        recompute=("selective",), compile=("on",), engine=("zero-3", "zero-3-hpz"),
    ),
)  # fmt: skip


def refused(choice: Choice) -> list[Refusal]:
    """The refusals that apply to a whole or partial choice."""
    return [refusal for refusal in REFUSALS if all(choice.get(name) == value for name, value in refusal.values)]
