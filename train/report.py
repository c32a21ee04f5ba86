"""Write the report's tables beside the published figures, and plots: `python -m train.report
DIR...`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from train.pages.page import write_report
from train.settings.config import folders_and_flags
from train.shared.errors import guarded

USAGE = """\
python -m train.report DIR [DIR ...] [--output_dir=DIR]

Collects every complete run (result.json, sharpness.json) below the folders, and those that
diverged. Writes report.md, tables.csv, runs.csv, runs.jsonl and plots into --output_dir (default:
the first DIR). A folder that has a runs.jsonl and no runs is read from it.
"""


def main(arguments: Sequence[str]) -> int:
    """Write the report, and return the exit code of the process."""
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    folders, flags = folders_and_flags(arguments, {"output_dir": "DIR"})
    path = write_report(folders, Path(flags.get("output_dir", folders[0])))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
