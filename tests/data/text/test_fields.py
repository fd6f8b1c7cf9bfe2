import pyarrow as pa
import pytest

from data.text.fields import column_fault, column_of, columns_in, keys_in, listed, value_in

RECORD = {"id": 1, "a": {"b": "x", "c": {"d": "y"}, "e.f": "z"}, "a.b": "top", "none": None, "empty": {}}


@pytest.mark.parametrize(
    ("field", "value"),
    [("a.b", "top"), ("a.c.d", "y"), ("a.e.f", "z"), ("none", None), ("none.x", None), ("a", RECORD["a"]), ("id", 1)],
)
def test_a_dot_leads_into_an_object(field, value):
    assert value_in(RECORD, field) == value


@pytest.mark.parametrize("field", ["x", "a.x", "a.b.c", "id.x", "empty.x", "", "a.", ".a"])
def test_what_is_not_there_is_not_null(field):
    with pytest.raises(KeyError):
        value_in(RECORD, field)


def test_the_fields_found_are_those_that_can_be_asked_for():
    found = list(keys_in(RECORD))
    assert found == ["id", "a.b", "a.c.d", "a.e.f", "a.b", "none", "empty"]
    for field in found:
        value_in(RECORD, field)
    assert listed(f"k{n}" for n in range(20)).endswith("k11 and 8 more") and listed([]) == "none"
    assert listed(["a\nb"]) == r"'a\nb'"


def batch(column, name="a"):
    return pa.record_batch([column], [name])


@pytest.mark.parametrize("field", ["a.b", "a.c.d", "a.e.f"])
def test_columns_inside_structs(field):
    """As JSON of the same records, a missing struct null."""
    records = [RECORD["a"], None, {"b": None, "c": None, "e.f": "w"}]
    column = pa.array(records, pa.struct([("b", pa.string()), ("c", pa.struct([("d", pa.string())])), ("e.f", pa.string())]))
    found = batch(column)
    assert list(columns_in(found.schema)) == ["a.b", "a.c.d", "a.e.f"] and not column_fault(found.schema, field)
    wanted = [value_in({"a": record}, field) for record in records]
    assert column_of(found, field).to_pylist() == [text and text.encode() for text in wanted]
    sliced = found.slice(1)
    assert column_of(sliced, field).to_pylist() == [text and text.encode() for text in wanted[1:]]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1]), "holds int64"),
        (pa.array([["x"]]), "holds list"),
        (pa.array([{"b": "x"}]), "is a struct: name a column inside it, a.b"),
        (pa.array([b"x"], pa.binary(1)), ""),
        (pa.nulls(1), ""),
        (pa.array(["x"], pa.string_view()), ""),
        (pa.array(["x"]).dictionary_encode(), ""),
        (pa.array(["x"], pa.large_string()), ""),
    ],
)
def test_which_columns_are_text(column, words):
    fault = column_fault(batch(column).schema, "a")
    assert words in fault and bool(fault) == bool(words)
    if not fault:
        value = column.to_pylist()[0]
        assert column_of(batch(column), "a").to_pylist() == [value.encode() if isinstance(value, str) else value]


def test_an_extension_type_is_what_it_is_stored_as():
    column = pa.array(['{"a": 1}'], pa.json_(pa.string()))
    assert column_fault(batch(column).schema, "a") == ""
    assert column_of(batch(column), "a").to_pylist() == [b'{"a": 1}']
