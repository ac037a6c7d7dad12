"""Describe a change to Megatron, and replace a function."""

import hashlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One change to Megatron. Calling it applies it; later calls do nothing.

    Attributes:
        apply: applies it.
        changes: function or class of Megatron, as `core.package.module:name` → the hash of the source that the patch
            was written for.
        provides: the feature that a user loses without it.
        ends: the change in Megatron that makes it unnecessary.
        is_needed: without it a result would be wrong, a checkpoint unsafe, or work lost.
        for_saving: needed only if the run saves checkpoints.
    """

    apply: Callable[[], None]
    changes: dict[str, str]
    provides: str
    ends: str
    is_needed: bool = False
    for_saving: bool = False

    def __call__(self) -> None:
        self.apply()

    def find_changed(self) -> list[str]:
        """Return the names in `changes` whose source in the installed Megatron has another hash."""
        return [name for name, digest in self.changes.items() if hash_source(name) != digest]


def hash_source(name: str) -> str:
    """Return eight hexadecimal digits for the source of `megatron.<name>`, or "" if it does not exist."""
    try:
        stock = inspect.unwrap(pkgutil.resolve_name(f"megatron.{name}"))
    except (ImportError, AttributeError):
        return ""
    return hashlib.sha256(inspect.getsource(stock).encode()).hexdigest()[:8]


def patch(
    changes: dict[str, str], provides: str, ends: str, is_needed: bool = False, for_saving: bool = False
) -> Callable[[Callable[[], None]], Patch]:
    """Return a decorator that makes a `Patch` from the function that applies it. The arguments are as in `Patch`."""
    return lambda apply: Patch(apply, changes, provides, ends, is_needed, for_saving)


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
