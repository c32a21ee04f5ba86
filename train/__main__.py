"""Make one training run: `python -m train`."""

import os
import sys
from collections.abc import Sequence

from train.settings.config import describe_keys, from_command_line
from train.shared.errors import guarded

USAGE = """\
python -m train [--experiment=NAME] [--KEY=VALUE ...] [--set SECTION.KEY=VALUE ...]

Trains one model. NAME is a file of train/configs (default: default), or the path of a YAML file. A
run is not lost: where one lies, --resume or --overwrite must say what to do. SIGTERM ends it with a
checkpoint and the exit code 75: a queue may start the same command, with --resume, again.
The keys of NAME, and the flags that override them, with their values where neither says otherwise:
"""


def main(arguments: Sequence[str]) -> int:
    """Run, print the table, and return the exit code of the process."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE + describe_keys())
        return 0
    config = from_command_line(arguments)
    # These are imported here, so that a typing error is answered before torch is imported.
    from train.loop.run import run
    from train.pages import page
    from train.shared.progress import make_console

    # Only one of torchrun's processes speaks.
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    result = run(config, console)
    if console.quiet:
        return 0
    page.print_summary(console, [result])
    console.print(f"written to {config.folder}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    code = guarded(main)
    if "RANK" in os.environ:
        # DistributedDataParallel keeps its group alive, whose gloo threads may outlive the
        # interpreter's objects and abort a finished run: leave before these are taken apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
