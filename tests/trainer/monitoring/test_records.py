"""Records of metrics.jsonl: read, truncated, and turned into curves."""

import math
from pathlib import Path

import pytest
import torch

from data.storage import replace_file
from tests.trainer.sinks import lines_only
from trainer.monitoring.records import FILE_NAME, json_safe, plain_value, read_records, scalars, truncate_records


def test_lines_of_an_older_tiglon_are_read(tmp_path: Path):
    (tmp_path / FILE_NAME).write_text('{"kind": "train", "step": 1, "loss": NaN, "grad_norm": Infinity}\n')
    assert math.isnan(read_records(tmp_path / FILE_NAME)[0]["loss"])


def test_kept_lines_do_not_change_by_a_byte(tmp_path: Path):
    path = tmp_path / FILE_NAME
    path.write_text('{"step":1,  "loss": 0.10}\n{"step": 2}\n')
    truncate_records(path, 1, replace_file)
    assert path.read_text() == '{"step":1,  "loss": 0.10}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / FILE_NAME
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 is not a JSON record"):
        read_records(path)


def test_lines_of_zeros_are_set_aside_with_a_sentence(tmp_path: Path):
    path, said = tmp_path / FILE_NAME, []
    path.write_bytes(b'{"kind": "train", "step": 1}\n' + bytes(60) + b"\n" + b'{"kind": "train", "step": 2}\n')
    lines_only(tmp_path, from_step=2, say=said.append).close()
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl.unreadable").read_bytes() == bytes(60) + b"\n"
    assert said == [f"metrics: 1 line that is no record was moved from {path} to metrics.jsonl.unreadable"]


def test_only_non_finite_floats_become_strings():
    value = {"a": [1.5, math.nan, (math.inf,)], "b": True, "c": "NaN", "d": -math.inf}
    assert json_safe(value) == {"a": [1.5, "NaN", ["Infinity"]], "b": True, "c": "NaN", "d": "-Infinity"}


def test_curves_are_named_by_kind_name_and_context():
    record = {"kind": "evaluate", "step": 3, "name": "contexts", "context": 512, "loss": 2.5, "tokens": 7}
    assert scalars(record) == {"evaluate/contexts/512/loss": 2.5, "evaluate/contexts/512/tokens": 7.0}
    assert scalars({"kind": "train", "step": 3, "skipped": True, "note": "text"}) == {"train/skipped": 1.0}
    assert plain_value(torch.tensor(2)) == 2 and plain_value("text") == "text"
