"""Read the values of Megatron's flags with Megatron's parser.

Importing Megatron takes seconds, so commands that need no value do not come here.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from ..console.places import ROOT, is_clone


def make_parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with ReMoE's flags. Call `megatron_on_cpu` before, unless Megatron is imported."""
    from megatron.remoe.training.arguments import add_remoe_arguments
    from megatron.training.arguments import add_megatron_arguments

    return add_remoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def read_values(words: Sequence[str]) -> argparse.Namespace:
    """Return the values of all of Megatron's flags, not validated.

    A process of its own imports Megatron for the CPU, which would change this one and the runs that it starts.

    Raises:
        SystemExit: Megatron's parser refuses a value and has printed why. Unknown flags are left to the training run.
    """
    command = [sys.executable, "-P", "-m", __name__, *words]
    result = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(result.returncode)
    return argparse.Namespace(**json.loads(result.stdout))


def child_environment() -> dict[str, str]:
    """Return this process's environment, in which a new one finds the project's modules."""
    if not is_clone():
        return dict(os.environ)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def main() -> None:
    """Print the values of the flags on the command line as JSON."""
    from megatron.remoe.start.messages import explain_flag_errors

    from ..models.on_cpu import megatron_on_cpu

    megatron_on_cpu()
    parser = make_parser()
    parser.prog = sys.argv[0] = "pretrain_gpt.py"
    explain_flag_errors(parser)
    values, _ = parser.parse_known_args(sys.argv[1:])
    print(json.dumps(vars(values), default=str))


if __name__ == "__main__":
    main()
