"""What a checkpoint says of the course of training it belongs to."""

import json

from trainer.checkpoint.lineage import Lineage, lineage_from


def test_a_record_brings_the_lineage_back() -> None:
    lineage = Lineage("0123456789ab", "s3://bucket/step-00000010", True)
    assert lineage_from(json.loads(json.dumps(lineage.record()))) == lineage


def test_the_keys_on_disk_stay_as_they_are() -> None:
    assert Lineage("a", "b", True).record() == {"id": "a", "source": "b", "weights_only": True}
    assert lineage_from({"id": "a", "launch": "of life.json"}) == Lineage("a")


def test_a_checkpoint_of_before_lineages_belongs_to_the_nameless_one() -> None:
    assert lineage_from({}) == Lineage("", "", False)
