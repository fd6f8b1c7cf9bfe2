"""The field of text in a record: a key of a JSON object or a column of a table, where a dot leads into an object or a struct.

A name that stands there as it is, dot and all, comes before one that leads inside.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

NAMES_SHOWN = 12
"""Names listed in a sentence."""


def value_in(record: dict[str, Any], field: str) -> Any:
    """The value of a field of a JSON object; None where an object on the way to it is null. Raises KeyError where it is not."""
    if field in record:
        return record[field]
    name, dot, inner = field.partition(".")
    if not dot:
        raise KeyError(field)
    within = record[name]
    if within is None:
        return None
    if not isinstance(within, dict):
        raise KeyError(field)
    return value_in(within, inner)


def keys_in(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields of a JSON object as `value_in` takes them."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from keys_in(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def column_fault(schema: pa.Schema, field: str) -> str:
    """Why a column cannot be read as text; "" if it can."""
    kind = _type_of(schema, field)
    if kind is None:
        return f"it has no column '{field}' but {listed(columns_in(schema))}"
    if pa.types.is_struct(kind):
        return f"column '{field}' is a struct: name a column inside it, {listed(f'{field}.{n}' for n in _leaves(kind))}"
    return "" if _is_text(kind) else f"column '{field}' holds {kind}, not text"


def columns_in(schema: pa.Schema) -> Iterator[str]:
    """The columns of a schema as `column_of` takes them."""
    for column in schema:
        inner = list(_leaves(column.type))
        yield from (f"{column.name}.{name}" for name in inner) if inner else [column.name]


def column_of(batch: pa.RecordBatch, field: str) -> pa.Array:
    """A column as bytes, so that invalid UTF-8 is found document by document, not as an exception of pyarrow for a whole batch.

    Raises pyarrow.ArrowException for a column whose buffers are not what its type says.
    """
    column = _child(batch, batch.schema.names, field)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    short = pa.types.is_string(column.type) or pa.types.is_binary(column.type)
    column = column.cast(pa.binary() if short else pa.large_binary())
    column.validate(full=True)
    return column


def _child(parent: pa.RecordBatch | pa.StructArray, names: list[str], field: str) -> pa.Array:
    """A column of a batch or a struct, null where a struct on the way to it is."""
    name, _, inner = (field, "", "") if field in names else field.partition(".")
    column = (
        parent.column(names.index(name))
        if isinstance(parent, pa.RecordBatch)
        else pc.call_function("struct_field", [parent], pc.StructFieldOptions([name]))
    )
    return _child(column, [child.name for child in column.type], inner) if inner else column


def listed(names: Any) -> str:
    """Names for a sentence, not all of them where there are many."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more or "none"


def _type_of(schema: pa.Schema, field: str) -> pa.DataType | None:
    """The type of a column, None where there is no such one."""
    if field in schema.names:
        return schema.field(schema.names.index(field)).type
    name, dot, inner = field.partition(".")
    if not dot or name not in schema.names:
        return None
    kind = schema.field(schema.names.index(name)).type
    return _type_of(pa.schema(list(kind)), inner) if pa.types.is_struct(kind) else None


def _leaves(kind: pa.DataType) -> Iterator[str]:
    """The columns inside a struct; nothing for another type."""
    if pa.types.is_struct(kind):
        yield from columns_in(pa.schema(list(kind)))


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary,
        pa.types.is_binary_view, pa.types.is_fixed_size_binary, pa.types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)
