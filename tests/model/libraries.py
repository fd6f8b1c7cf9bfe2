"""One sentence when a library changes an interface that it does not promise and tiglon uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest


@contextmanager
def relied_on(library: str, interface: str, use: str) -> Iterator[None]:
    """Checks of `interface` of an installed library; if any of them fails in any way, the test fails with one sentence.

    Args:
        library: distribution name.
        use: what relies on it, "model.x does y".
    """
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__} {error}".strip().split("\n")[0]
        pytest.fail(
            f"{library} {version(library)}: {interface} no longer does what tiglon relies on ({use}): {cause}; "
            "adapt the named function or pin the version before.",
            pytrace=False,
        )
