"""Use the installed package from outside the checkout: what a user's first minute does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import fdshare
import fdshare.integrations


def main() -> None:
    """Send a file through a Pipe and look at what was installed; raise where something is off."""
    package = Path(fdshare.__file__).parent
    if Path(sys.prefix) not in package.parents:
        raise SystemExit(f"fdshare was imported from {package}, not from the installed wheel")
    if not (package / "py.typed").is_file() or (package / "integrations").is_symlink():
        raise SystemExit(f"the wheel is incomplete: {sorted(path.name for path in package.iterdir())}")
    if version("fdshare") != fdshare.__version__:
        raise SystemExit(f"metadata says {version('fdshare')}, the package {fdshare.__version__}")

    here, there = fdshare.Pipe()
    with here, there, tempfile.TemporaryFile("w+") as file:
        file.write("sent by descriptor")
        here.send({"file": file})
        with there.recv()["file"] as received:
            received.seek(0)
            if received.read() != "sent by descriptor":
                raise SystemExit("the file arrived with other contents")
    for arguments in (["--version"], ["ls"], ["doctor"]):
        subprocess.run(
            [Path(sys.prefix) / "bin" / "fdshare", *arguments], check=True, stdout=subprocess.DEVNULL
        )
    print(f"fdshare {fdshare.__version__} works from {package}")


if __name__ == "__main__":
    main()
