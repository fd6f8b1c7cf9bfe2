"""Private attributes of libraries: where one is gone, the error is one sentence that says what relied on it."""

from importlib.metadata import version
from types import ModuleType
from typing import Any


def private_attribute(library: str, owner: Any, name: str, purpose: str) -> Any:
    """`owner.name`, which `library` (the name of its distribution) does not promise to keep.

    Args:
        purpose: what of tiglon relies on it.

    Raises:
        RuntimeError: it is not there; one sentence with library, version, attribute and purpose.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(private_api_changed(library, f"{_type_name(owner)}.{name}", purpose)) from None


def private_api_changed(library: str, attribute: str, purpose: str) -> str:
    """The sentence for an attribute that is gone, or no longer does what tiglon needs."""
    return (
        f"{library} {version(library)}: {attribute}, which {purpose} relies on, is missing or has changed; "
        f"install the version of {library} that `tiglon doctor` names"
    )


def _type_name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType | type) else type(owner).__name__
