"""What every family must keep: the defaults of transformers' configuration class, and its configuration on the way round."""

import json
from typing import Any

import transformers

from model.config import ModelConfig
from model.huggingface.families import FAMILIES, exported_config, imported_config
from model.positions.config import PositionConfig
from tests.model.huggingface.stock import CASES, SIZES, Case

KEYWORDS = {"sliding_window_pattern", "hidden_act"}
"""Keys that a class takes without a field of that name."""


def stock_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json as transformers writes it."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
    return {**json.loads(config.to_json_string()), "architectures": [FAMILIES[family].architecture]}


def check_defaults(family: str) -> None:
    """A key that is left out counts as it does in transformers, and a class's own key is never missing among them."""
    fields = transformers.AutoConfig.for_model(family).__class__.__dataclass_fields__
    theirs = {key: fields[key].default for key in FAMILIES[family].defaults if key not in KEYWORDS}
    theirs = {key: getattr(default, "default", default) for key, default in theirs.items()}
    assert theirs == {key: value for key, value in FAMILIES[family].defaults.items() if key not in KEYWORDS}


def check_round_trips(family: str) -> None:
    """Every case in, out as the same family, and in again: the same network; and transformers reads what goes out."""
    for name in CASES[family]:
        case = Case(family, name)
        values = stock_config(family, **CASES[family][name])
        model, position, length = imported_config(values, "config.json")
        network, rotation = ModelConfig.model_validate(model), PositionConfig.model_validate(position)
        out = exported_config(network, rotation, length, lossy=False, family=family)
        again, position_again, length_again = imported_config(out.values, "config.json")
        assert not out.lost, case
        assert ModelConfig.model_validate(again).effective() == network.effective(), case
        assert (PositionConfig.model_validate(position_again), length_again) == (rotation, length), case
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(out.values)))
        original = transformers.AutoConfig.for_model(family, **case.settings)
        for key in ("hidden_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps"):
            assert getattr(theirs, key) == getattr(original, key), (case, key)


def refusal_of(family: str, **changes: Any) -> str:
    """The sentence with which config.json of a family is refused when keys are set so; None deletes nothing."""
    try:
        imported_config({**stock_config(family), **changes}, "config.json")
    except ValueError as error:
        return str(error)
    return "imported"
