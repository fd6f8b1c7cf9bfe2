"""Configurations of 0.1.0 mean what they meant."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from launch.config import RunConfig, build_config
from launch.versions import translate, translate_checkpoint
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
    assert told == (
        "optimizer.learning_rate is now optimizer.tiger.learning_rate",
        "parallel.reduce_bucket_numbers is now parallel.reduce_bucket_elements",
    )
    assert built({"optimizer": {"tiger": {"learning_rate": 2e-3}}}).renamed == ()


def test_an_override_by_an_earlier_name_wins_over_the_file() -> None:
    config = built({"optimizer": {"tiger": {"learning_rate": 1e-2}}}, "optimizer.learning_rate=2e-3")
    assert config.optimizer.tiger.learning_rate == 2e-3
    config = built({"optimizer": {"name": "tiger"}}, "optimizer.learning_rate=2e-3", "optimizer.name=adamw")
    assert config.optimizer.adamw.learning_rate == 2e-3 and config.optimizer.tiger.learning_rate == 1e-3


def test_both_names_in_one_file_are_refused() -> None:
    both = {"optimizer": {"learning_rate": 1e-3, "tiger": {"learning_rate": 2e-3}}}
    with pytest.raises(ValueError, match=r"optimizer.learning_rate is now optimizer.tiger.learning_rate, and both are set"):
        translate(both)


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
