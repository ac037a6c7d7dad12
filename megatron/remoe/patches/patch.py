"""Describe a change to Megatron, and replace a function."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One change to Megatron. Calling it applies it; later calls do nothing.

    Attributes:
        apply: applies it.
        changes: file and function of Megatron.
        provides: the feature that a user loses without it.
        ends: the change in Megatron that makes it unnecessary.
        for_saving: needed only if the run saves checkpoints.
    """

    apply: Callable[[], None]
    changes: str
    provides: str
    ends: str
    for_saving: bool = False

    def __call__(self) -> None:
        self.apply()


def patch(changes: str, provides: str, ends: str, for_saving: bool = False) -> Callable[[Callable[[], None]], Patch]:
    """Return a decorator that makes a `Patch` from the function that applies it. The arguments are as in `Patch`."""
    return lambda apply: Patch(apply, changes, provides, ends, for_saving)


def replace(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Return a decorator that replaces `owner.name` with a function, unless it has done so before.

    The function gets the replaced function as its first argument.

    Args:
        owner: module or class.
        name: its function or method.
    """

    def put(function: Callable[..., Any]) -> None:
        stock, applied = getattr(owner, name), f"{function.__module__}.{function.__qualname__}"
        if applied in (names := getattr(stock, "patches", ())):
            return

        @wraps(stock)
        def patched(*arguments: Any, **options: Any) -> Any:
            return function(stock, *arguments, **options)

        patched.patches = (*names, applied)  # type: ignore[attr-defined]
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(patched) if is_static else patched)

    return put
