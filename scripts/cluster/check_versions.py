"""Check that this Python and the installed packages are what megatron-remoe requires; print each with its version.

Exit code 1 if one is missing or too old. A container image runs it when it is built.
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

NAME = "megatron-remoe"


def main() -> int:
    """Return the exit code."""
    wanted = {"python": SpecifierSet(metadata(NAME)["Requires-Python"])}
    for text in requires(NAME) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted[requirement.name] = requirement.specifier
    wrong = 0
    for name, specifier in wanted.items():
        try:
            found = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            found = "missing"
        fits = found != "missing" and specifier.contains(found, prereleases=True)
        wrong += not fits
        print(f"{name:15} {found:30} {'ok' if fits else f'error: {specifier or "any version"} is needed'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
