"""Signatures with defaults as text, which cross from one process to another, and what goes together with what."""

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Written:
    """A default, as it is written."""

    text: str

    def __repr__(self) -> str:
        return self.text


def signature(function: Callable[..., Any], follow_wrapped: bool = True) -> Signature:
    """Of a function or class, without annotations.

    Args:
        function: either.
        follow_wrapped: of what decorators stand around, instead of what they made of it.

    Raises:
        TypeError, ValueError: it has no signature.
    """
    found = inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values()
    return Signature([Parameter(one.name, one.kind, default=_default(one.default)) for one in found])


def _default(value: object) -> object:
    if value is Parameter.empty:
        return value
    plain = value is None or isinstance(value, bool | int | float | str | tuple)
    return Written(repr(value) if plain else getattr(value, "__name__", "..."))


def signature_of(arguments: ast.arguments) -> Signature:
    """Of a function as it is written."""
    return Signature(list(_parameters(arguments)))


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    for one, value in zip(positional, defaults, strict=True):
        yield Parameter(one.arg, Parameter.POSITIONAL_OR_KEYWORD, default=_written(value))
    if arguments.vararg:
        yield Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL)
    for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(one.arg, Parameter.KEYWORD_ONLY, default=_written(value))
    if arguments.kwarg:
        yield Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD)


def _written(value: ast.expr | None) -> object:
    return Parameter.empty if value is None else Written(ast.unparse(value))


def wrong_with_call(theirs: Signature, positional: int, keywords: Sequence[str]) -> str:
    """Why a function does not take a call; empty where it does."""
    try:
        theirs.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return ""


def wrong_with_replacement(ours: Signature, theirs: Signature) -> str:
    """What a function in the place of another does not take, or asks for besides; empty where all goes.

    One that has to be given may have another name at the same place, unless that is the name of another one of theirs.
    """
    takes = {one.kind for one in ours.parameters.values()}
    slots = [one for one in ours.parameters.values() if one.kind in POSITIONAL]
    given, lacking = set(theirs.parameters), []
    for place, one in enumerate(theirs.parameters.values()):
        if one.name in ours.parameters or one.kind in VARIABLE:
            continue
        slot = slots[place] if one.kind in POSITIONAL and place < len(slots) else None
        if slot is not None and slot.default is Parameter.empty and slot.name not in theirs.parameters:
            given.add(slot.name)
        elif Parameter.VAR_KEYWORD not in takes and (
            one.kind not in POSITIONAL or Parameter.VAR_POSITIONAL not in takes
        ):
            lacking.append(f"does not take {one.name}")
    for one in ours.parameters.values():
        if one.default is Parameter.empty and one.kind not in VARIABLE and one.name not in given:
            lacking.append(f"asks for {one.name}, which is not given")
    return "; ".join(lacking)


def shown_change(then: Signature | None, now: Signature | None) -> str:
    """Old → new; of a long one the names of those that differ. None is shown as one without parameters."""
    then, now = then or Signature(), now or Signature()
    whole = f"{then} → {now}"
    if len(whole) <= 160:
        return whole
    old, new = then.parameters, now.parameters
    parts = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "another default": [name for name in old if name in new and old[name] != new[name]],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names) or "another order"
