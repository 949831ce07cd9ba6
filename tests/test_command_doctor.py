"""``fdshare doctor``: what it says is so, and it notices what is taken away."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import run, run_as_nobody

from fdshare.command import doctor, probing
from fdshare.command.probing import Finding

STATES = {"ok", "warn", "missing"}
Report = dict[str, dict[str, Any]]


def findings(result: subprocess.CompletedProcess[str], code: int = 0) -> Report:
    assert (result.returncode, result.stderr) == (code, "")
    told = json.loads(result.stdout)
    return {one["name"]: one for one in told["findings"]}


@pytest.fixture(scope="module")
def report() -> Report:
    return findings(run("doctor", "--json"))


def test_every_probe_reports(report: Report) -> None:
    assert set(report) == {one.name for one in probing.probes}
    for one in report.values():
        assert set(one) == {"group", "name", "state", "needed", "found", "advice", "values"}
        assert one["state"] in STATES
        assert bool(one["advice"]) == (one["state"] != "ok")
        assert one["found"]
        assert "\n" not in one["found"]
    assert [one for one in report.values() if one["needed"] and one["state"] == "missing"] == []


def test_it_agrees_with_what_can_be_seen_otherwise(report: Report) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = report["descriptors of a process"]["values"]
    assert (limit["soft"], limit["hard"]) == (soft, hard)
    assert report["user"]["values"]["uid"] == os.geteuid()
    assert report["credentials of a peer"]["values"] == {"pid": True}
    assert report["descriptors in a packet"]["values"] == {"descriptors": 253}
    for name in ("seqpacket", "stream", "spawn", "forkserver", "fork"):
        assert report[name]["state"] == "ok"
    if sys.platform == "linux":
        sizes = report["largest packet"]["values"]
        # A page less 32 bytes is what the kernel adds to a packet in its accounts (sock_alloc_send_pskb).
        assert sizes["wmem_default"] - 4096 < sizes["default"] < sizes["wmem_default"]
        assert sizes["default"] <= sizes["raised"]
        pipe = Path("/proc/sys/fs/pipe-max-size").read_text()
        assert report["large pipes"]["values"]["pipe_max_size"] == int(pipe)
        assert report["sealed memory files"]["state"] == "ok"
        assert report["descriptors in flight"]["values"]["limited"] == (os.geteuid() != 0)


def test_report_for_people(report: Report) -> None:
    result = run("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    for name, one in report.items():
        assert any(
            line.split()[0] == one["state"] and name in line for line in lines[:-1] if line.startswith("  ")
        )
    assert [line for line in lines if line and not line.startswith(" ")][:-1] == list(doctor.GROUPS)
    assert lines[-1].endswith(" missing")


def test_nothing_is_left_behind() -> None:
    """In this process, under the leak check."""
    found = doctor.examine()
    assert {finding.state for _, finding in found} <= STATES


def test_low_limit_of_descriptors() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))

    one = findings(run("doctor", "--json", preexec_fn=lower))["descriptors of a process"]
    assert (one["state"], one["values"]["soft"], one["values"]["hard"]) == ("warn", 100, 200)
    assert "ulimit -S -n 200" in one["advice"]


def test_files_that_may_not_grow() -> None:
    """Where no file takes a byte there are no segments, and no temporary directory: the one is told, the other is fatal."""

    def forbid() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    report = findings(run("doctor", "--json", preexec_fn=forbid), code=1)
    for name in ("sealed memory files", "temporary directory"):
        assert report[name]["state"] == "missing"
        assert report[name]["advice"]
    assert report["sealed memory files"]["found"] == "File too large"
    assert (report["size of files"]["state"], report["size of files"]["values"]) == ("warn", {"most": 0})
    assert report["seqpacket"]["state"] == "ok"


def test_no_room_for_descriptors() -> None:
    """At a limit under which little can be opened it still reports, in one piece."""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))

    result = run("doctor", preexec_fn=lower)
    assert result.stderr == ""
    assert "Too many open files" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(" missing")


def test_runtime_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (one,) = (one for one in probing.probes if one.name == "runtime directory")
    for mode, state in ((0o755, "warn"), (0o700, "ok")):
        tmp_path.chmod(mode)
        finding = probing.run(one)
        assert (finding.state, finding.values["mode"]) == (state, f"0{mode:o}")


def test_another_user() -> None:
    """In flight there is a limit for those who are not root; and the interpreter may be out of reach for a new process."""
    result = run_as_nobody("doctor", "--json")
    report = findings(result, code=result.returncode)
    assert report["user"]["values"]["uid"] == 65534
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert report["descriptors in flight"]["values"] == {"limited": True, "limit": soft}
    assert report["directory for sockets"]["values"]["owner"] == 65534
    assert report["fork"]["state"] == "ok"


@pytest.mark.parametrize(
    "error", [OSError(38, "Function not implemented"), AttributeError("no os.x"), TimeoutError()]
)
def test_what_is_missing_says_what_that_means(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look() -> Finding:
        raise error

    for needed in (False, True):
        one = probing.Probe("memory", "a thing", look, "do without it", needed)
        monkeypatch.setattr(probing, "probes", [one])
        assert doctor.main(as_json=False) == needed
        out = capsys.readouterr().out
        assert "missing  a thing" in out
        assert "-> do without it" in out
        assert out.endswith("0 ok, 0 warnings, 1 missing\n")
