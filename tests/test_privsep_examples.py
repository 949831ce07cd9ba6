"""examples/privsep.py for real: a root helper, and a worker as nobody in an empty directory that tries to get more."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "privsep.py"
WORKER = Path(__file__).with_name("hostile_worker.py")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to separate")

DRIVER = """
import contextlib, os, sys
import privsep
privsep.PATIENCE = 0.5
mode, allowed, secret, worker = sys.argv[1:]
with contextlib.closing(privsep.Policy([allowed])) as policy:
    command = [sys.executable, worker, mode, allowed, secret, str(os.getpid())]
    sys.exit(privsep.run_worker(command, policy, sys.stdout.fileno()))
"""


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """A directory with a file, and with ways out of it that only its owner could have made."""
    found = tmp_path / "allowed"
    (found / "sub").mkdir(parents=True)
    (found / "plain").write_text("plain text")
    (found / "sub" / "deep").write_text("deep text")
    (found / "link").symlink_to("/etc/shadow")
    (found / "dirlink").symlink_to("/etc")
    (found / "self").symlink_to(".")
    (found / "sub" / "up").symlink_to("../..")
    os.mkfifo(found / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        directory = os.open(found, os.O_RDONLY)
        try:
            sock.bind(f"/proc/self/fd/{directory}/socket")
        finally:
            os.close(directory)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    return found


def run(*command: object, status: int | None = 0) -> str:
    path = os.pathsep.join([str(ROOT), str(EXAMPLE.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"},
        check=False,
    )
    assert status is None or result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + (result.stderr if status else "")


def attack(mode: str, allowed: Path) -> dict[str, Any]:
    """Run the hostile worker under the helper, and return what it reports."""
    report: dict[str, Any] = json.loads(run("-c", DRIVER, mode, allowed, allowed.parent / "secret", WORKER))
    return report


@needs_root
def test_worker_gets_what_the_policy_allows(allowed: Path) -> None:
    out = run(EXAMPLE, "--allow", allowed, allowed / "plain", allowed / "sub" / "deep")
    for name, text in (("plain", b"plain text"), ("sub/deep", b"deep text")):
        assert f"{hashlib.sha256(text).hexdigest()}  {allowed / name}" in out
    out = run(EXAMPLE, "--allow", allowed, allowed / "plain", "/etc/shadow", status=1)
    assert "/etc/shadow: refused: not below a directory that the policy names" in out


@needs_root
def test_hostile_worker_gets_nothing_else(allowed: Path) -> None:
    report = attack("ask", allowed)
    assert report["descriptors"] == []
    assert report["good"] == ["opened: plain text", "opened: deep text", "opened: deep text"]
    assert {reply.split()[0] for reply in report["paths"].values()} == {"refused:"}, report["paths"]
    assert report["still there"] == "opened: plain text"


@needs_root
def test_hostile_worker_is_confined(allowed: Path) -> None:
    alone = attack("ask", allowed)["alone"]
    assert alone.pop("look around") == "got []"
    assert alone.pop("who") == "got ((65534, 65534, 65534), (65534, 65534, 65534), [])"
    assert set(alone.values()) <= {"ENOENT", "EPERM", "EACCES"}, alone


@needs_root
def test_descriptor_is_good_for_reading_only(allowed: Path) -> None:
    report = attack("ask", allowed)["file"]
    assert set(report.values()) <= {"EBADF", "EINVAL", "EACCES", "ENOENT", "EPERM", "ENOTDIR"}, report
    assert (allowed / "plain").read_text() == "plain text"


@needs_root
def test_messages_of_another_sort_are_refused(allowed: Path) -> None:
    messages = attack("ask", allowed)["messages"]
    assert messages.pop("its own class") == "refused: only Open is answered"
    assert messages.pop("far too large") in ("refused: no message of this protocol", "EPERM")
    assert set(messages.values()) == {"refused: no message of this protocol"}, messages


@needs_root
def test_pickle_ends_the_connection(allowed: Path) -> None:
    assert attack("pickle", allowed) == {"end": "EPIPE"}


@needs_root
def test_descriptors_are_not_taken(allowed: Path) -> None:
    report = attack("descriptors", allowed)
    if report["sent"] == "EPERM":  # Linux 6.16 and later let a receiver say that it takes none
        assert report["still there"] == "opened: plain text"
    else:
        assert report["end"] == "EPIPE"


@needs_root
def test_worker_that_takes_no_answers_is_given_up(allowed: Path) -> None:
    report = attack("flood", allowed)
    assert report["end"] == "PeerClosedError"
    assert report["sent"] < 10_000


@needs_root
def test_no_root_no_separation() -> None:
    code = "import os, sys, privsep; os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(privsep.main())"
    assert "only where it is root" in run("-c", code, status=2)


@needs_root
@pytest.mark.parametrize(
    "path", ["\x01" * 8000, "\x1b[2J" * 1900, "é" * 4000, "\U0001f4a9" * 1900, "x\0y", "a/" * 4000]
)
def test_no_path_ends_the_helper(allowed: Path, path: str) -> None:
    """A refusal that quoted it would be too large for a message, or move a terminal's cursor."""
    code = """
import socket, sys, threading
import privsep, fdshare
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
policy = privsep.Policy([sys.argv[1]])
with fdshare.Channel(ours, codec=privsep.AT_THE_HELPER) as helper:
    with fdshare.Channel(theirs, codec=privsep.AT_THE_WORKER) as worker:
        thread = threading.Thread(target=privsep.serve, args=(helper, policy))
        thread.start()
        for _ in range(2):
            worker.send(privsep.Open(sys.argv[1] + "/" + eval(sys.argv[2])))
            reply = worker.recv(timeout=20)
            assert isinstance(reply, privsep.Refused) and reply.reason.isascii() and reply.reason.isprintable(), reply
        worker.send(privsep.Report(chr(27) + "[2J"))
    thread.join()
policy.close()
"""
    assert run("-c", code, allowed, ascii(path)) == "\\x1b[2J\n"


@needs_root
def test_a_path_that_goes_into_no_message_is_refused(allowed: Path) -> None:
    out = run(EXAMPLE, "--allow", allowed, "x" * 9000, allowed / "plain", "\x1b[2J", status=1)
    assert "max_bytes" in out
    assert str(allowed / "plain") in out
    assert "\\x1b[2J: refused" in out
    assert "\x1b" not in out


@needs_root
def test_a_file_that_the_kernel_makes_up_is_refused(allowed: Path) -> None:
    out = run(EXAMPLE, "--allow", "/proc", "--allow", allowed, "/proc/version", allowed / "plain", status=1)
    assert "/proc/version: refused: cannot send message.file" in out
    assert f"  {allowed / 'plain'}" in out
