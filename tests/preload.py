"""Imported once by the fork server, so that each test rank starts with the slow imports done."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import model.decoder  # noqa: F401
    import trainer.zero  # noqa: F401
