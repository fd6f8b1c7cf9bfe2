"""A config.json is the network that transformers reads in it, however it is spelled: with the keys of transformers 4, and
without the keys that transformers fills in itself, as published files are."""

import json
from contextlib import suppress
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError

from model.config import ModelConfig
from model.huggingface.families import FAMILIES, imported_config
from model.positions.config import PositionConfig
from tests.families.quick import cases
from tests.model.huggingface.stock import ALL, Case

LISTS = ("layer_types", "no_rope_layers")
"""Keys that name every layer; files of before they were there have a rule instead."""


def written(case: Case) -> dict[str, Any]:
    """config.json of transformers 5, with every key."""
    config = transformers.AutoConfig.for_model(case.family, **case.settings)
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [FAMILIES[case.family].architecture]}


def read_by_transformers(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json, every key."""
    kind = type(transformers.AutoConfig.for_model(values["model_type"]))
    return kind.from_dict(json.loads(json.dumps(values))).to_dict()


def older(values: dict[str, Any]) -> dict[str, Any]:
    """The same with the keys of transformers 4: rope_theta and rope_scaling, and Gemma's rope_local_base_freq."""
    rope = values["rope_parameters"]
    full = rope.get("full_attention", rope)
    scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    found = {key: value for key, value in values.items() if key != "rope_parameters"}
    found |= {"rope_theta": full["rope_theta"], "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}
    if values["model_type"] == "gemma3_text":
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return found


def shortest(values: dict[str, Any]) -> dict[str, Any]:
    """The same without the keys that transformers does not miss."""
    whole = read_by_transformers(values)
    for key in list(values):
        rest = {name: value for name, value in values.items() if name != key}
        with suppress(StrictDataclassClassValidationError, IndexError):  # the list of layers does not fit their number
            if key != "model_type" and read_by_transformers(rest) == whole:
                values = rest
    return values


def network(values: dict[str, Any]) -> tuple[dict[str, Any], PositionConfig, int]:
    """The network, its positions and its training length."""
    model, position, length = imported_config(values, "config.json")
    return ModelConfig.model_validate(model).effective(), PositionConfig.model_validate(position), length


@cases
def test_the_keys_of_transformers_4_are_read_as_transformers_reads_them(case: Case):
    """OLMo 3 cannot say with them that windowed layers have another base than its class's."""
    values = older(written(case))
    assert network(values) == network(read_by_transformers(values))


@cases
def test_what_transformers_fills_in_may_be_missing(case: Case):
    for spelling in (written(case), older(written(case))):
        short = shortest(spelling)
        assert len(short) <= len(spelling) / 2
        assert network(short) == network(read_by_transformers(spelling))


def test_every_family_with_a_list_of_layers_has_a_case_whose_list_follows_from_a_rule():
    listed, ruled = set(), set()
    for case in ALL:
        values = written(case)
        lists = {key for key in LISTS if key in values and len(set(values[key])) > 1}
        listed |= {case.family} if lists else set()
        ruled |= {case.family} if lists - shortest(values).keys() else set()
    assert listed - ruled == {"gemma3_text"}, "its own test reads the rule: tests/model/huggingface/test_gemma3.py"
    assert len(listed) > 4
