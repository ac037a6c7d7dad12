"""For tools that still call setup.py, and to put tools/ into the wheel as megatron.remoe.tools; see pyproject.toml."""

import sys

from setuptools import find_namespace_packages, find_packages, setup

# pip looks at requires-python only after it has downloaded torch.
if sys.version_info < (3, 12):  # noqa: UP036
    raise SystemExit(f"megatron-remoe needs Python 3.12 or newer; {sys.executable} is {sys.version.split()[0]}.")
INSTALLED = "megatron.remoe.tools"
rooms = find_packages("tools")
setup(
    packages=[
        *find_namespace_packages(include=["megatron.remoe*"]),
        INSTALLED,
        *(f"{INSTALLED}.{room}" for room in rooms),
    ],
    package_dir={INSTALLED: "tools"},
)
