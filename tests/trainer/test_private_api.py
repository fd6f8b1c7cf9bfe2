"""A private attribute is handed over, or its absence is one sentence."""

import math

import pytest
import torch

from trainer.private_api import private_attribute


def test_an_attribute_is_handed_over_and_a_missing_one_is_one_sentence() -> None:
    assert private_attribute("torch", math, "pi", "a test") == math.pi
    for owner, name in ((torch, "torch"), (torch.Tensor, "Tensor"), (torch.zeros(1), "Tensor")):
        with pytest.raises(RuntimeError) as caught:
            private_attribute("torch", owner, "_gone", "the speed of a test")
        text = str(caught.value)
        assert text.startswith(f"torch {torch.__version__}: {name}._gone, which the speed of a test relies on, is missing")
        assert "\n" not in text
