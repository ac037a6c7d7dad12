"""For tools that still call setup.py, and to put tools/ into the wheel as megatron.remoe.tools; see pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

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
