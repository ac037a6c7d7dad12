"""Start any tool in a clone: python tools COMMAND."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.start import main  # noqa: E402

sys.exit(main())
