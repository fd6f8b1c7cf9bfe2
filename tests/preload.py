"""Imported once by the fork server, so that each test rank starts with the slow imports done."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import launch.train  # noqa: F401
