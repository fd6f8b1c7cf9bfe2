"""What a checkpoint says of the course of training it belongs to."""

import json
from typing import Any

import pytest

from trainer.checkpoint.lineage import Lineage, lineage_from


def test_a_record_brings_the_lineage_back() -> None:
    lineage = Lineage("0123456789ab", "s3://bucket/step-00000010", True)
    assert lineage_from(json.loads(json.dumps(lineage.record()))) == lineage


def test_the_keys_on_disk_stay_as_they_are() -> None:
    assert Lineage("a", "b", True).record() == {"id": "a", "source": "b", "weights_only": True}
    assert lineage_from({"id": "a", "launch": "of life.json"}) == Lineage("a")


def test_a_checkpoint_of_before_lineages_belongs_to_the_nameless_one() -> None:
    assert lineage_from({}) == Lineage("", "", False)


@pytest.mark.parametrize("id", ["../x", "/x", "a/b", ".", "..", "a\0", "\x1b[31m", "x" * 65, "a\n", 7, None, ["a"]])
def test_an_id_that_is_no_plain_name_is_refused(id: Any) -> None:
    """Directories are called by it."""
    with pytest.raises(ValueError, match="no plain name"):
        lineage_from({"id": id})


@pytest.mark.parametrize("record", [[1], "x", 7, None, {"source": 7}, {"weights_only": "no"}, {"weights_only": 1}])
def test_a_record_of_other_types_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match="its lineage"):
        lineage_from(record)
