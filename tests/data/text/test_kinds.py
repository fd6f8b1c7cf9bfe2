import pytest

from data.text.kinds import kind_of


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("a.parquet", ("parquet", None)),
        ("A.JSONL.GZ", ("jsonl", "gzip")),
        ("a.txt.zst", ("text", "zstd")),
        ("a.arrow", ("arrow", None)),
        ("a.parquet.gz", None),  # Parquet and Arrow compress inside
        ("a.arrow.zst", None),
        ("a.gz", None),
        ("txt", None),
        ("s3://bucket/a.json?region=x.txt", ("jsonl", None)),
        ("what?.txt", ("text", None)),
    ],
)
def test_a_name_says_what_a_file_is(address, kind):
    assert kind_of(address) == kind
