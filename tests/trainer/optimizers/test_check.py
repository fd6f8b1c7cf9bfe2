"""Settings of the optimizer that are refused, and those that are remarked."""

from typing import Any, Literal

import pytest

from tests.trainer.rules import EMBEDDING_ADAMW, SEEN, optimizer
from trainer.optimizers.check import check_optimizer, remarks

PARAMETERS = [("model.embed_tokens.weight", "embedding"), ("model.norm.weight", "gain"), ("lm_head.weight", "matrix")]


@pytest.mark.parametrize(
    ("chosen", "tied", "engine", "reason"),
    [
        ({"rules": SEEN}, True, "zero", "optimizer.rules.embedding.rows = 'seen' .* the softmax gives every row a gradient"),
        ({"rules": SEEN, "name": "lion"}, True, "zero", "untie the embeddings"),
        ({"rules": {"matrix": {"rows": "seen"}}}, False, "zero", "is for embeddings, .* lm_head.weight is a matrix"),
        ({"embedding_rms": "row", "rules": EMBEDDING_ADAMW}, False, "zero", "optimizer.tiger.embedding_rms = 'row' scales"),
        ({"rules": {"lm_haed*": {"rule": "adamw"}}}, False, "zero", "optimizer.rules.lm_haed\\* fits no parameter"),
        ({"weight_decay": 1000.0}, False, "zero", "optimizer.tiger.learning_rate = 0.001 times .* make one of them smaller"),
        ({"rules": {"lm_head.*": {"weight_decay": 1e4}}}, False, "zero", "optimizer.rules.lm_head.\\*.weight_decay = 10000"),
        ({"name": "lion"}, False, "fold", "optimizer.name = 'lion': Lion mixes momentum and mean gradient"),
        ({"name": "adamw"}, True, "fold", "optimizer.name = 'adamw': AdamW needs the square"),
        ({"rules": EMBEDDING_ADAMW}, False, "fold", "optimizer.rules.embedding.rule = 'adamw'"),
        ({"max_grad_norm": 1.0}, True, "fold", "no step grows with its gradient"),
    ],
)
def test_what_cannot_work_is_refused(chosen: dict[str, Any], tied: bool, engine: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        check_optimizer(optimizer(**chosen), PARAMETERS, tied, engine)
    assert "\n" not in str(caught.value)


def test_what_works_is_accepted() -> None:
    engines: list[Literal["zero", "fold"]] = ["zero", "fold"]
    for engine in engines:
        check_optimizer(optimizer(), PARAMETERS, True, engine)
        check_optimizer(optimizer(rules=SEEN, max_grad_norm=0.0), PARAMETERS, False, engine)
    check_optimizer(optimizer(name="lion", rules=EMBEDDING_ADAMW), PARAMETERS, False, "zero")
    check_optimizer(optimizer(name="adamw", rules=SEEN), PARAMETERS, False, "zero")


def remarked(tied: bool, **chosen: Any) -> list[str]:
    return remarks(optimizer(**chosen), PARAMETERS, tied, 64)


def test_a_limit_that_logits_of_zero_reach_is_remarked() -> None:
    said = {limit: remarked(True, qk_clip=limit) for limit in (None, 4.15, 4.17)}
    assert said.pop(4.15)[0].startswith("optimizer.qk_clip = 4.15 clips every head in every step") and not any(said.values())


def test_an_absolute_rate_and_a_drifting_embedding_are_remarked() -> None:
    assert remarked(True) == []
    assert remarked(False, name="adamw", learning_rate=3e-6) == []
    assert "optimizer.tiger.learning_rate = 3e-06 looks like an absolute rate" in remarked(True, learning_rate=3e-6)[0]
    assert "relative to the RMS" in remarked(True, learning_rate=0.1)[0]
    assert "steadily" in remarked(False)[0]
    assert "exponentially" in remarked(False, embedding_rms="row")[0]
    assert remarked(False, rules=SEEN) == remarked(False, rules=EMBEDDING_ADAMW) == []
