"""Facts about the machine that a reader needs to judge the figures: nothing that identifies it, no names or paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata

__all__ = ["facts"]


def facts() -> dict[str, str]:
    """Return the facts, ready to print, in the order in which to show them."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cpus": str(os.cpu_count() or "unknown"),
        "system": f"{platform.system()} {kernel_version(platform.release())}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": _version("numpy"),
        "fdshare": _fdshare_version(),
    }
    if hasattr(os, "getloadavg"):
        found["load before the run"] = f"{os.getloadavg()[0]:.2f}"
    return found


def kernel_version(release: str) -> str:
    """Return the numbers of a kernel release; what a builder appended is nobody's business."""
    match = re.match(r"\d+(\.\d+)*", release)
    return match.group() if match else "unknown"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _fdshare_version() -> str:
    """Return the version of what the workers import: a checkout has no metadata."""
    try:
        from fdshare import __version__
    except Exception as error:  # noqa: BLE001 -- whatever it is, the workers' rows will say it
        return f"does not import ({type(error).__name__})"
    return __version__


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith(("model name", "Hardware", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
