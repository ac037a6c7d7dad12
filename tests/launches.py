"""Plan the training that a launch script would start."""

from tools.plan.rehearse.scripts import Launch
from tools.recipes.data import MADE_UP
from tools.recipes.launch import plan


def planned(launch: Launch) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the flags of a launch's training."""
    environment = launch.environment({"DRY_RUN": "command", "DATA_PATH": MADE_UP})
    found = plan(launch.size, launch.routing, [str(launch.gpus), "--", *launch.flags], environment)
    return found.settings, found.flags
