"""Start `command`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.gap.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
