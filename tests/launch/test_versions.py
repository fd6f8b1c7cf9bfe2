"""Configurations of 0.1.0 mean what they meant."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from launch.config import RunConfig
from launch.load_config import build_config
from launch.versions import translate_checkpoint, translate_position
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.lion import Lion
from trainer.optimizers.tiger import Tiger

FILES = Path(__file__).parent.parent / "versions" / "0.1.0"
EMBEDDING = ("model.embed_tokens.weight", "embedding")


def rules(config: RunConfig) -> tuple[Any, Any, str]:
    """Of matrices, of the embedding, and which of its rows are updated."""
    embedding = config.optimizer.assigned(*EMBEDDING)
    return config.optimizer.assigned("w", "matrix").rule, embedding.rule, embedding.rows


def built(values: dict[str, Any], *overrides: str) -> RunConfig:
    return build_config({"model": {"tie_word_embeddings": False}, **values}, overrides)


@pytest.mark.parametrize(
    ("old", "wanted"),
    [
        ({"learning_rate": 2e-3, "betas": [0.9]}, (Tiger(learning_rate=2e-3, beta=0.9),) * 2 + ("all",)),
        (
            {"name": "lion", "betas": [0.5, 0.6], "weight_decay": 0.3},
            (Lion(betas=(0.5, 0.6), weight_decay=0.3),) * 2 + ("all",),
        ),
        ({"name": "adamw", "eps": 1e-5}, (AdamW(eps=1e-5),) * 2 + ("all",)),
        ({"embedding": "lazy", "embedding_rms": "row"}, (Tiger(embedding_rms="row"),) * 2 + ("seen",)),
        (
            {"name": "lion", "embedding": "adamw", "embedding_learning_rate": 2e-3, "eps": 1e-6},
            (Lion(), AdamW(learning_rate=2e-3, weight_decay=0.0, eps=1e-6), "all"),
        ),
        ({"embedding": "plain", "embedding_weight_decay": 0.5}, (Tiger(), Tiger(), "all")),
        ({"rms_floor": 0.3, "non_finite": "shrink"}, (Tiger(rms_floor=0.3, non_finite="shrink"),) * 2 + ("all",)),
    ],
)
def test_a_section_of_the_optimizer_means_what_it_meant(old: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    assert rules(built({"optimizer": old})) == wanted
    assert rules(built({}, *(f"optimizer.{key}={value}" for key, value in old.items()))) == wanted


def test_each_new_name_is_told() -> None:
    told = built({"optimizer": {"learning_rate": 2e-3}}, "parallel.reduce_bucket_numbers=5").renamed
    assert set(told) == {
        "optimizer.learning_rate is now optimizer.tiger.learning_rate",
        "parallel.reduce_bucket_numbers is now parallel.reduce_bucket_elements",
    }
    assert built({"optimizer": {"tiger": {"learning_rate": 2e-3}}}).renamed == ()


def test_an_override_wins_over_the_file_whichever_name_each_has() -> None:
    new, old = {"optimizer": {"tiger": {"learning_rate": 1e-2}}}, {"optimizer": {"learning_rate": 1e-2}}
    assert built(new, "optimizer.learning_rate=2e-3").optimizer.tiger.learning_rate == 2e-3
    assert built(old, "optimizer.tiger.learning_rate=2e-3").optimizer.tiger.learning_rate == 2e-3
    line = {"optimizer": {"rules": {"embedding": {"rule": "adamw"}}}}
    assert rules(built(line, "optimizer.embedding=lazy"))[2] == "seen"


def test_file_and_overrides_mean_together_what_they_meant_together() -> None:
    config = built({"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.3}}, "optimizer.name=lion")
    assert config.optimizer.lion == Lion(learning_rate=1e-2, weight_decay=0.3)
    wanted = AdamW(learning_rate=0.1, weight_decay=0.0, eps=1e-3)
    own = ("optimizer.embedding_learning_rate=1e-1", "optimizer.eps=1e-3", "optimizer.embedding=adamw")
    assert rules(built({}, *own))[1] == rules(built({}, *own[::-1]))[1] == wanted
    file = {"optimizer": {"embedding": "adamw", "embedding_learning_rate": 0.1, "eps": 1e-3}}
    assert rules(built(file, "optimizer.embedding=adamw"))[1] == wanted


def test_a_renamed_value_is_taken_in_an_override_and_for_evaluation() -> None:
    assert built({}, "position.kind=yarn", "position.factor=2", "position.yarn_ramp=turns").position.yarn_ramp == "rotations"
    assert translate_position({"kind": "yarn", "yarn_ramp": "turns"}) == {"kind": "yarn", "yarn_ramp": "rotations"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"learning_rate": 1e-3, "tiger": {"learning_rate": 2e-3}},
            "is now optimizer.tiger.learning_rate, and both",
        ),
        (
            {"embedding": "adamw", "rules": {"embedding": {"rule": "lion"}}},
            "is now optimizer.rules.embedding, and both",
        ),
        ({"embedding": "adam"}, "optimizer.embedding = 'adam': it was 'lazy', 'adamw' or 'plain'"),
        ({"embedding": True}, "optimizer.embedding = True"),
        ({"learning_rate": 1e-2, "tiger": 3}, "optimizer.tiger = 3 is a value, not a table"),
        ({"embedding": "adamw", "rules": 3}, "optimizer.rules = 3 is a value, not a table"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        built({"optimizer": values})


def test_both_names_typed_are_refused_and_a_section_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="both are set"):
        built({}, "optimizer.learning_rate=1e-2", "optimizer.tiger.learning_rate=2e-2")
    with pytest.raises(ValueError, match="optimizer"):
        build_config({"optimizer": 3})


@pytest.mark.parametrize("path", sorted(FILES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_files_of_the_version_load(path: Path) -> None:
    values = tomllib.loads(path.read_text())
    old = values["optimizer"]
    config = build_config(values)
    assert config.renamed and config.optimizer.name == old.get("name", "tiger")
    assert config.optimizer.rate == old.get("learning_rate", config.optimizer.rate)
    assert config.parallel.reduce_bucket_elements == values.get("parallel", {}).get("reduce_bucket_numbers", 50_000_000)


def test_a_checkpoints_keys_without_effect_are_left_out() -> None:
    config = {
        "optimizer": {"name": "tiger", "learning_rate": 1e-3, "betas": [0.9], "eps": 1e-8, "rms_floor": None},
        "position": {"kind": "rope", "yarn_ramp": "turns", "mixed_exponent": 0.625},
    }
    found = translate_checkpoint(config)
    assert found["position"] == {"kind": "rope"}
    sections = {"tiger": {"learning_rate": 1e-3, "beta": 0.9}, "adamw": {"eps": 1e-8}}
    assert found["optimizer"] == {"name": "tiger", **sections}


def test_a_project_of_weights_and_biases_means_what_it_meant() -> None:
    for config in (built({"log": {"wandb": "cub"}}), built({}, "log.wandb=cub")):
        assert (config.log.tracker, config.log.project) == ("wandb", "cub")
        assert set(config.renamed) == {"log.wandb is now log.tracker", "log.wandb is now log.project"}
    assert built({"log": {"wandb": ""}}).log.tracker == "none"
    assert built({"log": {"tracker": "wandb"}}, "log.wandb=").log.tracker == "none"
    assert built({"log": {"wandb": "cub"}}, "log.tracker=none").log.tracker == "none"
    assert built({"log": {"wandb": "cub"}}, "log.project=new").log.project == "new"
    with pytest.raises(ValueError, match=r"log.wandb is now log.tracker, and both are set; leave the first one out"):
        built({"log": {"wandb": "cub", "tracker": "wandb"}})
