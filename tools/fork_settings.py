"""Read what the authors' fork sets: its nine launch scripts, taken through its own parser.

git clone https://github.com/thu-ml/ReMoE fork
python tools/fork_settings.py fork    write tools/cost/fork.json anew
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common.files import write_json  # noqa: E402
from tools.common.flags import parse  # noqa: E402
from tools.common.places import ROOT  # noqa: E402
from tools.cost.paper import FORK, NAMES, ROUTINGS, SIZES  # noqa: E402

# Called by the scripts in place of torchrun: writes the flags, and what the fork's parser makes of them.
TORCHRUN = """#!{python}
import json, sys
sys.path.insert(0, {fork!r})
sys.argv = sys.argv[sys.argv.index("pretrain_gpt.py"):]
flags = sys.argv[1:]
from megatron.training.arguments import parse_args
with open({answer!r}, "w") as file:
    json.dump({{"flags": flags, "settings": vars(parse_args())}}, file, default=str)
"""
RENAMED = {"layernorm_epsilon": "norm_epsilon"}  # here: in the fork


def ask(fork: Path, size: str, routing: str) -> dict[str, Any]:
    """The flags of one script, and all settings that the fork's parser gets from them."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun, answer = Path(folder, "torchrun"), Path(folder, "answer.json")
        torchrun.write_text(TORCHRUN.format(python=sys.executable, fork=str(fork), answer=str(answer)))
        torchrun.chmod(0o755)
        environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        script = fork / "scripts" / f"train_llama_{size}_{routing}.sh"
        run = subprocess.run(["bash", str(script)], cwd=folder, env=environment, capture_output=True, text=True)
        if not answer.exists():
            raise SystemExit(
                f"{script} did not come to torchrun with flags of pretrain_gpt.py:\n{run.stdout}{run.stderr}"
            )
        return dict(json.loads(answer.read_text()))


def by_flag(words: list[str]) -> dict[str, str]:
    """Flag → its values as they were typed; the paths of the data, which are long, as a setting only."""
    return {flag: " ".join(values) for flag, values in parse(words).items() if flag != "--data-path"}


def shared(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries that all tables have alike as "all", and what is left of each."""
    first = next(iter(tables.values()))
    same = {key: value for key, value in first.items() if all(key in t and t[key] == value for t in tables.values())}
    rest = {name: {key: value for key, value in t.items() if key not in same} for name, t in tables.items()}
    return {"all": same} | rest


def main() -> int:
    """Write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fork", type=Path, help="a checkout of github.com/thu-ml/ReMoE")
    fork = parser.parse_args().fork.resolve()
    flags, settings = {}, {}
    for size in SIZES:
        for routing in ROUTINGS:
            answer = ask(fork, size, routing)
            flags[f"{size}_{routing}"] = by_flag(answer["flags"])
            given = answer["settings"]
            settings[f"{size}_{routing}"] = {name: given[RENAMED.get(name, name)] for name in NAMES}
    commit = subprocess.run(
        ["git", "-C", str(fork), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    table = {"repository": "https://github.com/thu-ml/ReMoE", "commit": commit}
    write_json(FORK, table | {"flags": shared(flags), "settings": shared(settings)})
    print(f"{FORK.relative_to(ROOT)}: {len(flags)} scripts at {commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
