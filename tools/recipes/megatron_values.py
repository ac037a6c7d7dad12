"""Read the values of Megatron's flags with Megatron's parser.

Importing Megatron takes seconds, so commands that need no value do not use this module.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from ..console.places import ROOT, is_clone


def make_parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with ReMoE's flags. Call `megatron_on_cpu` first, unless Megatron is imported."""
    from megatron.remoe.start.messages import explain_flag_errors
    from megatron.remoe.training.arguments import add_remoe_arguments
    from megatron.training.arguments import add_megatron_arguments

    parser = add_remoe_arguments(add_megatron_arguments(argparse.ArgumentParser("pretrain_gpt.py", allow_abbrev=False)))
    explain_flag_errors(parser)
    return parser


def read_values(words: Sequence[str]) -> argparse.Namespace:
    """Return the values of all of Megatron's flags, not validated; unknown flags are left to the training run.

    If this process has not imported Megatron, a new process reads the values: Megatron on the CPU would change this
    process and the runs that it starts.

    Raises:
        UsageError: Megatron's parser refuses a value; SystemExit if a new process read the values and printed why.
    """
    if "megatron.training.arguments" in sys.modules:
        return make_parser().parse_known_args(words)[0]
    command = [sys.executable, "-P", "-m", __name__, *words]
    result = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(result.returncode)
    return argparse.Namespace(**json.loads(result.stdout))


def child_environment() -> dict[str, str]:
    """Return this process's environment, extended so that a new process finds the project's modules."""
    if not is_clone():
        return dict(os.environ)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


if __name__ == "__main__":
    from .on_cpu import megatron_on_cpu

    megatron_on_cpu()
    from megatron.remoe.start.messages import usage_errors

    sys.argv[0] = "pretrain_gpt.py"
    with usage_errors():
        print(json.dumps(vars(make_parser().parse_known_args(sys.argv[1:])[0]), default=str))
