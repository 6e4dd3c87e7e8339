"""Where hypothesis isn't installed, as may be on a GPU machine, its tests skip and all others run."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType

import pytest


class _Anything(ModuleType):
    """Stands for what is only named here: strategies, settings; as a decorator it leaves its function as it is."""

    def __getattr__(self, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return arguments[0] if arguments and isinstance(arguments[0], FunctionType) else self

    def __or__(self, other: object) -> "_Anything":
        return self


def _given(*strategies: object, **named: object) -> Callable[[FunctionType], FunctionType]:
    def skipped(function: FunctionType) -> FunctionType:
        def test(*arguments, **fixtures):
            pytest.skip("hypothesis is not installed")

        # What hypothesis would give, pytest would look for among its fixtures.
        left = [p for name, p in inspect.signature(function).parameters.items() if name not in named]
        test.__signature__ = inspect.Signature(left[: len(left) - len(strategies)])
        test.__name__, test.pytestmark = function.__name__, getattr(function, "pytestmark", [])
        return test

    return skipped


def install() -> None:
    """Puts a stand-in for hypothesis into sys.modules where there is none."""
    if importlib.util.find_spec("hypothesis") is None:
        module = _Anything("hypothesis")
        module.given = _given
        sys.modules |= {"hypothesis": module, "hypothesis.strategies": module}
