"""Signatures as plain data, which cross from one process to another, and what goes together with what."""

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        name, kind: as `inspect` has them.
        default: as it is written; None where it has to be given.
    """

    name: str
    kind: str
    default: str | None

    @property
    def is_variable(self) -> bool:
        """Whether it takes any number of arguments."""
        return self.kind.startswith("VAR")


def parameters(function: Callable[..., Any], follow_wrapped: bool = True) -> list[Parameter]:
    """Of a function or class.

    Args:
        function: either.
        follow_wrapped: of what decorators stand around, instead of what they made of it.

    Raises:
        TypeError, ValueError: it has no signature.
    """
    found = inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values()
    return [Parameter(one.name, one.kind.name, _default(one.default)) for one in found]


def _default(value: object) -> str | None:
    if value is inspect.Parameter.empty:
        return None
    plain = value is None or isinstance(value, bool | int | float | str | tuple)
    return repr(value) if plain else getattr(value, "__name__", "...")


def parameters_of(arguments: ast.arguments) -> tuple[Parameter, ...]:
    """Of a function as it is written."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [ast.unparse(one) for one in arguments.defaults]
    found = [Parameter(one.arg, POSITIONAL[1], default) for one, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, "VAR_POSITIONAL", None))
    for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(one.arg, "KEYWORD_ONLY", ast.unparse(value) if value else None))
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, "VAR_KEYWORD", None))
    return tuple(found)


def wrong_with_call(theirs: Sequence[Parameter], positional: int, keywords: Sequence[str]) -> str:
    """Why a function does not take a call; empty where it does."""
    signature = inspect.Signature(
        [
            inspect.Parameter(
                one.name,
                getattr(inspect.Parameter, one.kind),
                default=inspect.Parameter.empty if one.default is None else one.default,
            )
            for one in theirs
        ]
    )
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return ""


def wrong_with_replacement(ours: Sequence[Parameter], theirs: Sequence[Parameter]) -> str:
    """What a function in the place of another does not take, or asks for besides; empty where all goes.

    One that has to be given may have another name at the same place, unless that is the name of another one of theirs.
    """
    our_names, their_names = {one.name for one in ours}, {one.name for one in theirs}
    takes = {one.kind for one in ours if one.is_variable}
    slots = [one for one in ours if one.kind in POSITIONAL]
    given, lacking = set(their_names), []
    for place, one in enumerate(theirs):
        if one.name in our_names or one.is_variable:
            continue
        slot = slots[place] if one.kind in POSITIONAL and place < len(slots) else None
        if slot is not None and slot.default is None and slot.name not in their_names:
            given.add(slot.name)
        elif "VAR_KEYWORD" not in takes and (one.kind not in POSITIONAL or "VAR_POSITIONAL" not in takes):
            lacking.append(f"does not take {one.name}")
    for one in ours:
        if one.default is None and not one.is_variable and one.name not in given:
            lacking.append(f"asks for {one.name}, which is not given")
    return "; ".join(lacking)


def shown(found: Sequence[Parameter]) -> str:
    """A signature in one line."""
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    words = [
        f"{stars.get(one.kind, '')}{one.name}" + ("" if one.default is None or one.is_variable else f"={one.default}")
        for one in found
    ]
    first = next((place for place, one in enumerate(found) if one.kind == "KEYWORD_ONLY"), None)
    if first is not None and not any(one.kind == "VAR_POSITIONAL" for one in found):
        words.insert(first, "*")
    return f"({', '.join(words)})"


def shown_change(then: Sequence[Parameter], now: Sequence[Parameter]) -> str:
    """Old → new; of a long one the names of those that differ."""
    whole = f"{shown(then)} → {shown(now)}"
    if len(whole) <= 160:
        return whole
    gone, come = ([one.name for one in some if one not in others] for some, others in ((then, now), (now, then)))
    changed = [name for name in gone if name in come]
    parts = {
        "new": [name for name in come if name not in changed],
        "gone": [name for name in gone if name not in changed],
        "another default": changed,
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names) or "another order"
