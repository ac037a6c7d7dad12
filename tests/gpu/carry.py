"""Collect what the GPU tests need beyond PyTorch, for a machine without network: python tests/gpu/carry.py FOLDER.

Downloads the wheels that requirements.txt names, and prints their sizes and that of the checkout.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron-core", "fla-core", "filelock")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 2**20


def main() -> int:
    """Download the wheels and print the sizes; return 1 if a download fails or the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version there (default: 3.12)")
    parser.add_argument("--limit", type=float, default=64, help="MiB that can be carried (default: 64)")
    options = parser.parse_args()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    if subprocess.run([*command, *(f"{name}=={pinned[name]}" for name in PACKAGES)]).returncode:
        return 1
    sizes = {path.name: path.stat().st_size for path in sorted(options.folder.glob("*.whl"))}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes["the checkout's tracked files"] = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name)
    for name, size in [*sizes.items(), ("in all", sum(sizes.values()))]:
        print(f"{size / MIB:8.2f} MiB  {name}")
    if sum(sizes.values()) > options.limit * MIB:
        print(f"error: this is more than --limit {options.limit:g} MiB.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
