"""What config.json says of layers of experts, in families whose router takes the softmax over all of them."""

from typing import Any

from model.config import ModelConfig
from model.huggingface.reader import ConfigReader

LOSSES = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""Keys of the loss that transformers adds to even out loads: over a batch, where tiglon's is over a sequence. They are a choice
of whoever trains, and change nothing in what the network computes."""


def read_count(config: ConfigReader, name: str, alias: str) -> dict[str, Any]:
    """The number of experts and how many of them a token goes to.

    Args:
        name: of the key that holds the number.
        alias: another name of it, which transformers takes for the same.
    """
    count = config.size(alias if alias in config and name not in config else name)
    if alias in config and config.size(alias) != count:
        raise config.refusal(alias, f"is not {name} = {count}, and means the same; leave one of them out")
    chosen = config.size("num_experts_per_tok")
    if chosen > count:
        raise config.refusal("num_experts_per_tok", f"is above {name} = {count}")
    return {"n_routed_experts": count, "num_experts_per_tok": chosen}


def read_groups(config: ConfigReader, least: int) -> dict[str, Any]:
    """Groups of neighbouring experts, and of how many a token chooses among the experts.

    Args:
        least: experts of a group by which it is judged.
    """
    count, chosen = config.size("n_routed_experts"), config.size("num_experts_per_tok")
    groups, kept = config.size("n_group"), config.size("topk_group")
    if count % groups or count // groups < least:
        raise config.refusal("n_group", f"must divide n_routed_experts = {count} into groups of at least {least}")
    if kept > groups:
        raise config.refusal("topk_group", f"is above n_group = {groups}")
    if kept * (count // groups) < chosen:
        raise config.refusal(
            "topk_group", f"of n_group = {groups} groups have fewer experts than num_experts_per_tok = {chosen}"
        )
    return {"n_group": groups, "topk_group": kept}


def read_softmax_experts(config: ConfigReader, name: str, alias: str, width: str) -> dict[str, Any]:
    """[model] as far as it is of layers without shared experts; `norm_topk_prob` is up to the family.

    Args:
        name, alias: as in read_count.
        width: name of the key that holds the width of an expert.
    """
    return {
        **read_count(config, name, alias),
        "moe_intermediate_size": config.size(width),
        "n_shared_experts": 0,
        "scoring_func": "softmax",
        "router_bias": False,
    }


def written_experts(model: ModelConfig, name: str, width: str) -> dict[str, Any]:
    """The same on the way out."""
    return {name: model.n_routed_experts, "num_experts_per_tok": model.num_experts_per_tok, width: model.moe_intermediate_size}
