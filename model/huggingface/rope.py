"""Rotary positions as config.json has them, in the spellings of transformers 4 (rope_theta, rope_scaling) and 5
(rope_parameters)."""

from typing import Any

from model.huggingface.reader import ConfigReader
from model.positions.config import PositionConfig
from model.positions.maps.yarn import yarn_mscale


def read_rope(config: ConfigReader, length: int, default_theta: float, latent: bool = False) -> tuple[dict[str, Any], int]:
    """[position] of a model whose layers all rotate alike, and its training length in tokens.

    rope_scaling, if set, replaces rope_parameters as a whole; the base of either goes before config.json's own rope_theta.

    Args:
        length: max_position_embeddings, in tokens.
        default_theta: base where none is given.
        latent: latent attention, whose heads have a part that is not rotated: YaRN has a factor for each.

    Raises:
        ValueError: one sentence that names the key.
    """
    older, newer = config.object("rope_scaling"), config.object("rope_parameters")
    theta = config.number("rope_theta") if "rope_theta" in config else default_theta
    config.only("partial_rotary_factor", None, 1.0, 1)
    return read_scaling(older or newer, length, theta, latent)


def read_layer_ropes(
    config: ConfigReader, length: int, thetas: tuple[float, float], local_key: str = ""
) -> tuple[dict[str, Any], int]:
    """The same for a model whose windowed layers rotate by a base of their own: Gemma 3 and OLMo 3.

    Args:
        thetas: bases of full and of windowed layers where none are given.
        local_key: config.json's name for the base of windowed layers in transformers 4, if there is one.
    """
    full_theta, windowed_theta = thetas
    full_theta = config.number("rope_theta") if "rope_theta" in config else full_theta
    windowed_theta = config.number(local_key) if local_key and local_key in config else windowed_theta
    config.only("partial_rotary_factor", None, 1.0, 1)
    older, newer = config.object("rope_scaling"), config.object("rope_parameters")
    full = windowed = None
    if newer is not None:
        full, windowed = newer.object("full_attention"), newer.object("sliding_attention")
        if full is None and windowed is None:
            raise config.refusal("rope_parameters", "must have the objects full_attention and sliding_attention")
        newer.finish()
    if windowed is not None:
        for key in ("rope_type", "type"):
            if key in windowed:
                windowed.only(key, "default")
        windowed.only("partial_rotary_factor", None, 1.0, 1)
        windowed_theta = windowed.number("rope_theta") if "rope_theta" in windowed else windowed_theta
        windowed.finish()
    if older is not None:  # transformers lays it over rope_parameters of full layers, whose type is default if they have none
        below = {"rope_type": "default"} if full is None else full.values
        full = ConfigReader({**below, **older.values}, {}, older.where, older.prefix, older.ignored)
    position, trained = read_scaling(full, length, full_theta)
    return position | {"windowed_rope_theta": windowed_theta}, trained


def read_scaling(rope: ConfigReader | None, length: int, theta: float, latent: bool = False) -> tuple[dict[str, Any], int]:
    """[position] of one object of rope parameters, and the training length in tokens; `latent` as in read_rope."""
    if rope is None:
        return {"kind": "rope", "rope_theta": theta}, length
    theta = rope.number("rope_theta") if "rope_theta" in rope else theta
    if "partial_rotary_factor" in rope:
        rope.only("partial_rotary_factor", 1.0, 1)
    rope.take("type")
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.choice(key, ("default", "linear", "llama3", "yarn")) if key in rope else "default"
    position: dict[str, Any] = {"rope_theta": theta}
    match kind:
        case "linear":
            factor = _factor(rope)
            position, length = {"kind": "pi", **position, "factor": factor}, max(1, int(length / factor))
        case "llama3":
            position = {"kind": "llama3", **position, **_llama3(rope, length)}
        case "yarn":
            position = {"kind": "yarn", **position, **_yarn(rope, length, latent)}
            length = position["trained_length"]
        case _:
            position = {"kind": "rope", **position}
    rope.finish()
    return position, length


def _factor(rope: ConfigReader) -> float:
    factor = rope.number("factor")
    if factor < 1:
        raise rope.refusal("factor", "must be at least 1")
    return factor


def _llama3(rope: ConfigReader, length: int) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.refusal("low_freq_factor", f"must be below high_freq_factor = {high}")
    trained = _trained_length(rope, length)
    return {"factor": _factor(rope), "low_freq_factor": low, "high_freq_factor": high, "trained_length": trained}


def _trained_length(rope: ConfigReader, length: int) -> int:
    key = "original_max_position_embeddings"
    return rope.size(key) if key in rope else length


def _yarn(rope: ConfigReader, length: int, latent: bool) -> dict[str, Any]:
    factor = _factor(rope)
    position = {
        "factor": factor,
        "yarn_ramp": "index",
        "yarn_truncate": rope.flag("truncate") if "truncate" in rope else True,
        "trained_length": _trained_length(rope, length),
    }
    for key in ("beta_fast", "beta_slow"):
        if (value := rope.optional_number(key)) is not None:
            position[key] = value
    given = rope.optional_number("attention_factor")
    mscale, all_dim = (rope.number(key) if rope.take(key) else None for key in ("mscale", "mscale_all_dim"))
    rotated = yarn_mscale(factor)
    if mscale and all_dim:
        rotated = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    rotated = rotated if given is None else given
    if not latent:
        return position | ({} if rotated == yarn_mscale(factor) else {"attention_factor": rotated})
    whole = yarn_mscale(factor, all_dim) if all_dim else 1.0
    return position | ({} if all_dim == 1.0 else {"attention_factor": whole}) | {"rotated_factor": rotated}


def written_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters as keys of config.json, for readers of either spelling."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "rope_parameters": rope,
    }


def written_layer_ropes(position: PositionConfig, rope: dict[str, Any], local_key: str = "") -> dict[str, Any]:
    """The same, where windowed layers have a base of their own; `local_key` as in read_layer_ropes."""
    theta = position.windowed_rope_theta or position.rope_theta
    layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    local = {local_key: theta} if local_key else {}
    return {**written_rope(rope), **local, "rope_parameters": layers}
