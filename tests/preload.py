"""Imported once by the fork server, so that each test rank starts with the slow imports done."""

import torch._dynamo  # noqa: F401

import model.parallel  # noqa: F401 (Megatron-Core: five seconds a rank)
