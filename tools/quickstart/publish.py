"""Puts a quickstart's table and picture into README.md and docs/, as they were measured.

.venv/bin/python tools/quickstart/publish.py runs/quickstart
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.markdown import table  # noqa: E402
from tools.common.places import ROOT  # noqa: E402
from tools.quickstart import models, report  # noqa: E402

BLOCK = re.compile(r"(<!-- quickstart:begin -->\n).*?(<!-- quickstart:end -->)", re.DOTALL)


def markdown(summary: dict[str, Any]) -> str:
    """The table of README.md."""
    remoe, spread = summary["remoe"], report.read_spread(summary["iterations"])
    deviation = {model: f"{spread['val_loss_std'][model]:.3f}" for model in models.NAMES} if spread else {}
    rows = {
        "validation loss, nats per byte": {model: f"{summary[model]['val_loss']:.3f}" for model in models.NAMES},
        **({"standard deviation over three seeds": deviation} if spread else {}),
        "active parameters": {model: f"{summary[model]['active_params']:,}" for model in models.NAMES},
        "total parameters": {model: f"{summary[model]['total_params']:,}" for model in models.NAMES},
        "training tokens": {model: f"{summary[model]['train_tokens']:,}" for model in models.NAMES},
        "tokens per second": {model: f"{summary[model]['tokens_per_second']:,.0f}" for model in models.NAMES},
        "sparsity, last quarter (target)": {
            "remoe": f"{remoe['sparsity_last_quarter']:.4f} ({remoe['sparsity_target']:.3f})"
        },
    }
    cells = ([name, *(row.get(model, "") for model in models.NAMES)] for name, row in rows.items())
    return "\n".join(table(["", *models.NAMES.values()], cells, text=1)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    run = parser.parse_args().run
    try:
        text = markdown(json.loads((run / "summary.json").read_text(encoding="utf-8")))
        shutil.copyfile(run / "report.png", ROOT / "docs" / "quickstart.png")
    except OSError as error:
        print(f"publish.py: {error}. Give the folder of a finished quickstart.", file=sys.stderr)
        return 1
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda found: found[1] + text + found[2], readme.read_text(encoding="utf-8")), "utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
