"""Functions that torch.compile does not compile."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def disable_compile(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`torch.compiler.disable` that imports the compiler at the function's first call.

    The import takes as long as that of PyTorch itself, and most commands never call such a function.
    """
    disabled: list[Callable[Parameters, Result]] = []

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call
