"""The examples in docstrings are run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["packing", "engines", "engines.torch", "scope", "threads", "rate", "autoscale"])
def test_the_examples_in_the_docstrings_hold(module: str) -> None:
    ran = doctest.testmod(importlib.import_module(f"serve_app.{module}"))
    assert ran.attempted > 0 and ran.failed == 0
