"""Say what results were made with: the processor, and the commit of this working copy."""

import platform
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Return a name such as 5fdc6e5d4c3b, with -dirty if files were changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:  # there is no git here
        return None
    return described.stdout.strip() or None


def processor() -> str:
    """Return the name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
