"""What one Megatron has, as the process that looked at it hands it to another."""

from dataclasses import dataclass
from inspect import Signature


@dataclass(frozen=True)
class Fact:
    """What a path leads to.

    Attributes:
        signature: of a function or class; None for what has none.
        body: a hash of what its code does.
        place: file and line.
        error: why there is nothing; empty where there is something.
    """

    signature: Signature | None = None
    body: str = ""
    place: str = ""
    error: str = ""


@dataclass(frozen=True)
class Look:
    """All that was found.

    Attributes:
        modules: where `megatron.core` and `megatron.training` come from.
        facts: by path, with the paths that are replaced.
        moe_settings: the configuration's fields that are about MoE → file and line.
        replaced: path → signature of what the patches and the CPU part put there, None for an object that is called.
        failed: what a patch changes → why it cannot be made.
        patches: how many there are.
    """

    modules: dict[str, str]
    facts: dict[str, Fact]
    moe_settings: dict[str, str]
    replaced: dict[str, Signature | None]
    failed: dict[str, str]
    patches: int
