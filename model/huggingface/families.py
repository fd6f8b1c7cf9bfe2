"""The families that can be imported and exported, and config.json in and out.

A network goes out as the first family whose config.json, read back, gives the same network: nothing is exported as something
near it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.huggingface.deepseek_v2 import DeepseekV2
from model.huggingface.deepseek_v3 import LATENT_EPS, DeepseekV3
from model.huggingface.family import HARMLESS, SAMPLING, Family
from model.huggingface.gemma3 import Gemma3
from model.huggingface.llama import Llama
from model.huggingface.mistral import Mistral
from model.huggingface.mixtral import Mixtral
from model.huggingface.olmo2 import Olmo2
from model.huggingface.olmo3 import Olmo3
from model.huggingface.olmoe import Olmoe
from model.huggingface.phi3 import Phi3
from model.huggingface.qwen2 import Qwen2
from model.huggingface.qwen3 import Qwen3
from model.huggingface.qwen3_moe import Qwen3Moe
from model.huggingface.reader import ConfigReader
from model.huggingface.smollm3 import SmolLM3
from model.positions.config import POSITION_MAPS, PositionConfig

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llama(), Mistral(), Qwen2(), Qwen3(), SmolLM3(), Olmo2(), Olmo3(), Gemma3(), Phi3(), Mixtral(), Qwen3Moe(), Olmoe(),
        DeepseekV3(), DeepseekV2(),
    )
}  # fmt: skip
"""By transformers' model_type, in the order in which they are tried on the way out."""
ROUTER_TRAINING = {"router_bias_rate", "router_bias_step", "router_aux_loss_coef", "router_z_loss_coef"}
"""Keys of what moves a router in training: no part of the network."""


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json: that of its model_type, as which transformers loads it.

    Raises:
        ValueError: one sentence, if it is none of them; `where` names the file.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(f"{where} has model_type = {kind!r}; those that can be imported: {', '.join(FAMILIES)}")
    if named is not None and named != [family.architecture]:
        raise ValueError(
            f"{where} has architectures = {named!r}; of model_type = {kind!r} only {family.architecture} can be imported"
        )
    return family


def imported_config(
    config: dict[str, Any], where: str, ignore: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """[model] and [position] for a config.json, and its training length in tokens.

    Args:
        where: names the file in sentences.
        ignore: keys that the user vouches for.

    Raises:
        ValueError: one sentence that names the key, where tiglon would not compute the same network.
    """
    family = family_of(config, where)
    reader = ConfigReader(config, family.defaults, where, ignored=set(ignore))
    model, position, length = family.read(reader)
    reader.finish(HARMLESS | SAMPLING | family.harmless)
    for key in reader.ignored:
        raise ValueError(f"--ignore {key}: {where} has no such key, or tiglon reads it; leave it out")
    return model, position, length


@dataclass(frozen=True)
class ExportedConfig:
    """How a network goes out."""

    family: Family
    values: dict[str, Any]
    """config.json, without ids of special tokens and the dtype of weights."""
    lost: list[str]
    """A sentence for everything that is lost."""


def exported_config(
    model: ModelConfig, position: PositionConfig, trained_length: int, lossy: bool, family: str = "", first: str = ""
) -> ExportedConfig:
    """The family and the config.json of a network.

    Args:
        trained_length: tokens.
        lossy: export although something is lost; otherwise it is refused.
        family: model_type of the family to export as; default the first that computes the same.
        first: model_type of the one that is tried before the others.

    Raises:
        ValueError: no family computes the network, or something is lost and `lossy` is not set.
    """
    stock, lost = _stock_model(model)
    trained = position.trained_length or trained_length
    longest = max(int(trained * position.map.length_factor()), trained_length)
    rope, lost_positions = _stock_rope(model, position, trained)
    lost += lost_positions
    if lost and not lossy:
        raise ValueError(f"the export would lose something: {'; '.join(lost)}; export with --lossy to accept that")
    candidates = sorted(_candidates(stock, family), key=lambda each: each.model_type != first)
    nearest: list[tuple[int, str]] = []
    for candidate in candidates:
        values = _written(candidate, stock, position, rope) | {"max_position_embeddings": longest}
        differences = _read_back(values, stock, position, trained)
        if not differences:
            return ExportedConfig(candidate, values, lost)
        nearest.append((len(differences), f"{candidate.architecture} {differences[0]}"))
    fault = (
        "this stock architecture computes another network:"
        if family
        else "no stock architecture computes this network; the nearest:"
    )
    raise ValueError(f"{fault} {min(nearest, key=lambda each: each[0])[1]}")


def _stock_model(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The network as stock architectures may have it, and a sentence for everything that is lost."""
    tied = model.tie_word_embeddings and model.tied_head in ("plain", "small-init")
    changed: dict[str, Any] = {"tie_word_embeddings": tied, "tied_head": "plain", "pad_vocab_to_multiple": 1}
    lost = []
    if model.attention == "mla" and (eps := model.latent_norm_eps or model.rms_norm_eps) != LATENT_EPS:
        changed["latent_norm_eps"] = LATENT_EPS
        lost.append(f"transformers adds {LATENT_EPS:g} in the norms of the latents, the model was trained with {eps:g}")
    return model.model_copy(update=changed), lost


def _stock_rope(model: ModelConfig, position: PositionConfig, trained: int) -> tuple[dict[str, Any], list[str]]:
    """rope_parameters of the map, and a sentence for everything that is lost."""
    rope = position.map.rope_parameters(model.attention, model.rotary_size, trained)
    if rope is None:
        stock = {kind: made.stock for kind, made in POSITION_MAPS.items() if made.stock is not None}
        names = (kind + (f" ({condition})" if condition else "") for kind, condition in stock.items())
        raise ValueError(
            f"position.kind = '{position.kind}' has no stock architecture here; those that have: {', '.join(names)}"
        )
    lost = [f"position.kind = '{position.kind}' {what}"] if (what := position.map.lost()) else []
    if position.log_n == "trained":
        lost.append("the log n scale of the queries, which the model was trained with, is left out")
    if position.log_n == "inference":
        lost.append(f"the log n scale of the queries is left out: positions from {trained} tokens on differ")
    return rope, lost


def _candidates(model: ModelConfig, wanted: str) -> list[Family]:
    """Families of the kinds of layers that the network has, or the one wanted."""
    if wanted and wanted not in FAMILIES:
        raise ValueError(f"--family {wanted}: legal are {', '.join(FAMILIES)}")
    families = list(FAMILIES.values())
    for key, kinds in (
        ("attention", lambda family: [family.attention]),
        ("feed_forward", lambda family: family.feed_forwards()),
    ):
        legal = {kind: None for family in families for kind in kinds(family)}
        families = [family for family in families if getattr(model, key) in kinds(family)]
        if not families:
            raise ValueError(
                f"{key} = '{getattr(model, key)}' has no stock architecture here; those that have: {', '.join(legal)}"
            )
    if not wanted:
        return families
    if FAMILIES[wanted] not in families:
        names = ", ".join(family.model_type for family in families)
        raise ValueError(f"--family {wanted} has other kinds of layers; those that have the network's: {names}")
    return [FAMILIES[wanted]]


def _written(family: Family, model: ModelConfig, position: PositionConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """config.json of a family, as far as the family can say what the network is."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = {ours: activation for activation, ours in family.activations.items()}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{name: getattr(model, name) for name in sizes},
        family.activation_key: theirs.get(model.feed_forward, "silu"),
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        **family.write(model, position, rope),
    }


def _read_back(values: dict[str, Any], model: ModelConfig, position: PositionConfig, trained: int) -> list[str]:
    """In what the network of a config.json differs from the one it was written for, to follow the architecture's name."""
    try:
        model_values, position_values, _ = imported_config(values, "its config.json")
        read, rotated = ModelConfig.model_validate(model_values), PositionConfig.model_validate(position_values)
    except ValueError as error:
        return [f"cannot: {error}"]
    return _differences(read, model) + _different_rotation(read, rotated, position, trained)


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """What differs in the networks of two configurations, each to follow the name of an architecture."""
    pairs = zip(_network(theirs).items(), _network(ours).values())
    return [f"has {key} = {their!r}, the network {our!r}" for (key, their), our in pairs if their != our]


def _network(model: ModelConfig) -> dict[str, Any]:
    """The keys that act, with those that say the same in several ways replaced by what they say of each layer."""
    several = {
        "tied_head", "residual_init", "sliding_window", "full_attention_layers", "full_attention_position",
        "layers_without_positions", "pad_vocab_to_multiple",
    } | ROUTER_TRAINING  # fmt: skip
    layers = range(model.num_hidden_layers)
    acting = {key: value for key, value in model.effective().items() if key not in several}
    return acting | {
        "sliding_window": [None if model.full_layer(layer) else model.sliding_window for layer in layers],
        "rotated layers": [model.rotated_layer(layer) for layer in layers],
    }


def _different_rotation(model: ModelConfig, theirs: PositionConfig, ours: PositionConfig, trained: int) -> list[str]:
    """In what two maps differ in the layers of a network; what was told as lost does not count."""
    if ours.map.lost():
        return []
    rotated = [layer for layer in range(model.num_hidden_layers) if model.rotated_layer(layer)]
    for windowed in {not model.full_layer(layer) for layer in rotated}:
        one, other = (_rotation(position, model.rotary_size, trained, windowed) for position in (theirs, ours))
        if not torch.allclose(one, other, rtol=1e-9, atol=0.0):
            which = "windowed" if windowed else "full"
            return [f"cannot say how position.kind = '{ours.kind}' rotates {which} layers beside the others"]
    return []


def _rotation(position: PositionConfig, size: int, trained: int, windowed: bool) -> Tensor:
    """Radians per token of each pair of channels, and the factors of the queries and of their rotated part, float64."""
    trained = position.trained_length or trained
    position = position.of_windowed_layers if windowed else position
    one = position.map.near_rotation(torch.ones((), dtype=torch.float64))
    factors = torch.tensor([position.map.query_scale(), position.map.rotated_factor()], dtype=torch.float64)
    return torch.cat((position.map.frequencies(size, trained) * one, factors))
