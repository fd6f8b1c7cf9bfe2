"""Which rule moves which parameter, and values that the sections refuse."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.trainer.rules import optimizer
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.config import AssignedRule, OptimizerConfig, rule_names
from trainer.optimizers.lion import Lion
from trainer.optimizers.muon import Muon
from trainer.optimizers.tiger import Tiger


def test_a_name_alone_chooses_a_rule_with_its_own_defaults() -> None:
    assert rule_names() == ["tiger", "lion", "muon", "adamw"]
    rules = [OptimizerConfig(name=name, tiger=Tiger(beta=0.9)).assigned("w", "matrix").rule for name in rule_names()]
    assert rules == [Tiger(beta=0.9), Lion(), Muon(), AdamW()]
    assert [OptimizerConfig(name=name).rate for name in rule_names()] == [1e-3, 1e-4, 1e-3, 1e-3]
    assert OptimizerConfig().clipping == 1.0 and OptimizerConfig(max_grad_norm=0.0).clipping == 0.0


def test_the_first_line_that_fits_decides() -> None:
    lines = {
        "model.layers.0.*": {"rule": "lion", "betas": [0.5, 0.6]},
        "embedding": {"rule": "adamw", "weight_decay": 0.0},
        "matrix": {"learning_rate": 2e-3},
    }
    settings = optimizer(rules=lines, beta=0.9)
    found = settings.assigned("model.layers.0.mlp.up_proj.weight", "matrix")
    assert (found.name, found.rule, found.pattern) == ("lion", Lion(betas=(0.5, 0.6)), "model.layers.0.*")
    assert settings.assigned("model.embed_tokens.weight", "embedding").rule == AdamW(weight_decay=0.0)
    assert settings.assigned("lm_head.weight", "matrix").rule == Tiger(learning_rate=2e-3, beta=0.9)
    assert settings.assigned("model.norm.weight", "gain").rule == Tiger(beta=0.9)
    assert optimizer(rules={"embedding": "adamw"}).assigned("e", "embedding").rule == AdamW()


def test_what_a_rule_does_not_move_goes_to_another() -> None:
    lines = {
        "gain": "tiger", "*.mlp.*": {"rule": "muon", "beta": 0.5}, "matrix": {"beta": 0.6}, "embedding": {"weight_decay": 0.0},
        "*": {"learning_rate": 1e-2},
    }  # fmt: skip
    settings = optimizer("muon", others="lion", rules=lines)
    chosen = {
        ("model.layers.0.self_attn.q_proj.weight", "matrix"): ("muon", Muon(others="lion", beta=0.6), "matrix", ""),
        ("model.layers.0.mlp.up_proj.weight", "matrix"): ("muon", Muon(others="lion", beta=0.5), "*.mlp.*", ""),
        ("model.layers.0.mlp.up_proj.bias", "bias"): ("lion", Lion(learning_rate=1e-2), "*", "muon"),
        ("model.embed_tokens.weight", "embedding"): ("lion", Lion(weight_decay=0.0), "embedding", "muon"),
        ("lm_head.weight", "head"): ("lion", Lion(learning_rate=1e-2), "*", "muon"),
        ("model.norm.weight", "gain"): ("tiger", Tiger(), "gain", ""),
    }
    for (name, kind), wanted in chosen.items():
        found = settings.assigned(name, kind)
        assert (found.name, found.rule, found.pattern, found.instead_of) == wanted
    assert optimizer("muon", others="lion").assigned("w", "bias") == AssignedRule("lion", Lion(), instead_of="muon")
    for_matrices_alone = optimizer("muon", rules={"*": {"nesterov": False}})
    assert for_matrices_alone.assigned("w", "matrix").rule == Muon(nesterov=False)
    with pytest.raises(ValueError, match=r"^unknown key rules\.\*\.nesterov; legal here: rule, rows, learning_rate"):
        for_matrices_alone.assigned("w", "gain")


def test_the_head_is_a_matrix_unless_a_line_names_it() -> None:
    lines = {"matrix": {"learning_rate": 2e-3}}
    assert optimizer(rules=lines).assigned("lm_head.weight", "head").rule == Tiger(learning_rate=2e-3)
    assert optimizer(rules={"head": "adamw", **lines}).assigned("lm_head.weight", "head").rule == AdamW()
    assert optimizer(rules={"matrix": "muon"}).assigned("lm_head.weight", "head").name == "tiger", "Muon moves no head"
    assert optimizer(rules={"matrix": "lion"}).assigned("lm_head.weight", "head").name == "lion"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"name": "sgd"}, "'sgd' is no update rule; legal: tiger, lion, muon, adamw"),
        ({"tiger": {"beta": 1.0}}, "less than 1"),
        ({"lion": {"betas": [0.9]}}, "betas"),
        ({"rules": {"embedding": {"rule": "adam"}}}, "rules.embedding.rule = 'adam' is no update rule"),
        ({"rules": {"embedding": {"beta1": 0.9}}}, "unknown key rules.embedding.beta1; legal here: rule, rows, learning_rate"),
        ({"rules": {"gain": {"weight_decay": -1}}}, "rules.gain.weight_decay = -1: input should be greater than or equal to 0"),
        ({"rules": {"embedding": {"rows": "some"}}}, "'all' or 'seen'"),
        ({"rules": {"embedding": {"weight_decay": True}}}, "rules.embedding.weight_decay = True: it takes a number"),
        ({"rules": {"embedding": {"learning_rate": "1e-2"}}}, "rules.embedding.learning_rate = '1e-2': it takes a number"),
        ({"rules": {"": {"rule": "lion"}}}, "a line without a kind or a pattern"),
        ({"rules": {"matrix": {"rule": "muon", "nesterov": 1.5}}}, "rules.matrix.nesterov = 1.5"),
        ({"muon": {"others": "muon"}}, "muon.others = 'muon' is no rule that moves everything; legal: tiger, lion, adamw"),
        ({"rules": {"matrix": {"rule": "muon", "others": "lion"}}}, "rules.matrix.others has no effect"),
        ({"name": "muon", "rules": {"*": {"others": "lion"}}}, "rules.\\*.others has no effect: a line moves"),
        ({"rules": {"gain": "muon"}}, "rules.gain.rule = 'muon' does not move a gain; legal: 'tiger', 'lion', 'adamw'"),
        ({"name": "muon", "rules": {"gain": {"nesterov": True}}}, "unknown key rules.gain.nesterov; legal here: rule, rows, l"),
        ({"name": "muon", "rules": {"*": {"eta": 1}}}, "unknown key rules.\\*.eta; legal here: rule, rows, learning_rate"),
    ],
)
def test_what_a_section_does_not_take_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        OptimizerConfig.model_validate(values)
