"""The options offer what the reader of text knows, no more and no less."""

from enum import StrEnum
from typing import Any, get_args

import pytest

from data.text.formats import OnError, TextDocuments
from launch.commands.text_options import OnErrorChoice, TextDocumentsChoice


@pytest.mark.parametrize(("offered", "known"), [(TextDocumentsChoice, TextDocuments), (OnErrorChoice, OnError)])
def test_every_choice_is_known_and_every_known_one_is_offered(offered: type[StrEnum], known: Any):
    assert {choice.value for choice in offered} == set(get_args(known))
