"""The benchmarks' own arithmetic and output: medians, paired ratios, targets, tables and the chart; no timing is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import chart, machine, report
from benchmarks.cases import native
from benchmarks.measure import BATCHES, FIRST, measure
from benchmarks.model import Case, Measurement, Target
from benchmarks.plan import CASES, select
from benchmarks.runner import parse_result
from benchmarks.stats import PeerResult, Row, paired_ratio, summarise

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def make_case(target: Target | None = None, title: str = "a case") -> Case:
    def run(peer: str, budget: float) -> Measurement:
        raise NotImplementedError

    return Case("a-case", title, "Group", run, ("fdshare", "multiprocessing", "C"), "multiprocessing", target)


def make_row(
    ours: list[float],
    theirs: list[float],
    target: Target | None = None,
    *,
    mode: str = "pinned",
    title: str = "a case",
) -> Row:
    peers = {"fdshare": PeerResult(ours), "multiprocessing": PeerResult(theirs), "C": PeerResult([1e-6])}
    return summarise(make_case(target, title), mode, peers)


# --- measuring and statistics ---------------------------------------------------------------------------------------


def test_measure_short_operation_is_batched() -> None:
    calls: list[int] = []

    def operate(n: int) -> float:
        calls.append(n)
        return n * 1e-6

    seconds = measure(operate, 0.1)
    assert seconds == pytest.approx([1e-6] * BATCHES)
    assert calls[-BATCHES:] == [10_000] * BATCHES  # a tenth of the budget each


@pytest.mark.parametrize(("took", "batches"), [(0.02, 5), (1.0, 2)])
def test_measure_long_operation_is_repeated_singly(took: float, batches: int) -> None:
    calls: list[int] = []

    def operate(n: int) -> float:
        calls.append(n)
        return n * took

    assert measure(operate, 0.1) == [took] * batches
    assert calls == [1] * (FIRST + batches)


def test_ratio_is_paired_by_round() -> None:
    # the machine slowed down by ten in the last two rounds: each round's own ratio does not notice
    assert paired_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
    assert paired_ratio([2.0, 4.0, 6.0], [1.0, 1.0, 1.0]) == 4.0
    assert paired_ratio([], [1.0]) is None


def test_peer_result_median_and_spread() -> None:
    result = PeerResult([1.0, 3.0, 2.0])
    assert result.seconds == 2.0
    assert result.spread == 1.0
    assert PeerResult([]).seconds is None
    assert PeerResult([]).spread is None


@pytest.mark.parametrize(
    ("target", "ours", "theirs", "met"),
    [
        (Target("faster", 2.0), 1.0, 2.0, True),
        (Target("faster", 2.0), 1.0, 1.9, False),
        (Target("share", 0.5), 1.0, 2.0, True),
        (Target("share", 0.5), 1.1, 2.0, False),
        (Target("micros", 3.0), 3e-6, 1.0, True),
        (Target("micros", 3.0), 3.1e-6, 1.0, False),
    ],
)
def test_target_is_judged(target: Target, ours: float, theirs: float, met: bool) -> None:
    row = make_row([ours], [theirs], target)
    assert row.met is met
    assert row.target == target


def test_target_is_judged_pinned_only() -> None:
    row = make_row([1.0], [9.0], Target("faster", 2.0), mode="unpinned")
    assert row.met is None
    assert row.target is None
    assert row.times_faster == 9.0


def test_target_without_baseline_is_open() -> None:
    assert make_row([1.0], [], Target("faster", 2.0)).met is None


# --- the plan and the workers ---------------------------------------------------------------------------------------


def test_plan_names_are_unique_and_peers_complete() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.peers[0] == "fdshare"
        assert case.baseline in case.peers


def test_select_by_name_and_quick() -> None:
    assert [case.name for case in select(["roundtrip"], quick=False)] == ["roundtrip"]
    assert len(select([], quick=False)) == len(CASES)
    assert all(not case.heavy for case in select([], quick=True))
    with pytest.raises(ValueError, match="no benchmark is called 'nonsense'"):
        select(["nonsense"], quick=False)


@pytest.mark.parametrize(
    ("status", "output", "errors", "start"),
    [
        (0, '{"skipped": "no compiler"}\n', "", "skipped: no compiler"),
        (1, "", "Traceback\nValueError: oh\n", "broke: ValueError: oh"),
        (0, "garbage\n", "", "broke: printed 'garbage'"),
        (0, "", "", "broke: exit status 0"),
        (-9, "", "", "broke: exit status -9"),
        (0, '{"seconds": [], "extra": {}}\n', "", "broke"),
    ],
)
def test_worker_without_measurement_says_why(status: int, output: str, errors: str, start: str) -> None:
    found = parse_result(status, output, errors)
    assert isinstance(found, str)
    assert found.startswith(start)


@pytest.mark.parametrize("case", ["roundtrip", "socket-1", "array-64KiB", "wait-10"])
def test_worker_measures_in_a_process_of_its_own(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", case, "multiprocessing", "0.01"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=50,
    )
    found = parse_result(done.returncode, done.stdout, done.stderr)
    assert isinstance(found, Measurement), found
    assert len(found.seconds) >= 2
    assert min(found.seconds) > 0


@pytest.mark.parametrize("mode", ["roundtrip", "oneway", "separate"])
def test_c_peer_runs(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = native.build(tmp_path)
    if binary is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv(native.BINARY_VARIABLE, str(binary))
    found = native.run_native(mode, 64, 3, 0.01)
    assert min(found.seconds) > 0
    assert set(found.extra) == ({"close"} if mode == "separate" else set())


# --- the output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (2.5, "2.50 s"),
        (0.1234, "123 ms"),
        (0.001, "1.00 ms"),
        (12.34e-6, "12.3 µs"),
        (0.42e-6, "0.42 µs"),
    ],
)
def test_duration_has_three_digits(seconds: float | None, text: str) -> None:
    assert report.duration(seconds) == text


def test_text_table_shows_marks_and_neighbours() -> None:
    rows = [
        make_row([10e-6], [20e-6], Target("faster", 1.5), title="good"),
        make_row([10e-6], [20e-6], Target("faster", 3.0), title="bad"),
        make_row([10e-6], [20e-6], mode="unpinned", title="free"),
    ]
    text = report.to_text(rows)
    (good,) = [line for line in text.splitlines() if line.startswith("good")]
    (bad,) = [line for line in text.splitlines() if line.startswith("bad")]
    assert "2.00×" in good
    assert "✓" in good
    assert "C 1.00 µs" in good
    assert "✗" in bad
    assert text.index("one CPU") < text.index("wherever the scheduler")


def test_broken_tells_what_broke_and_not_what_was_skipped() -> None:
    peers = {
        "fdshare": PeerResult([], problem="broke: OSError: oh"),
        "multiprocessing": PeerResult([1.0]),
        "C": PeerResult([], problem="skipped: no C compiler"),
    }
    row = summarise(make_case(Target("faster", 2)), "pinned", peers)
    assert report.broken([row]) == ["pinned a-case, fdshare broke: OSError: oh"]
    assert "C skipped" in report.to_text([row])
    assert row.met is None


def test_markdown_table_is_well_formed() -> None:
    text = report.to_markdown([make_row([1e-6], [2e-6], title="a|b")], {"cpu": "some"}, "chart.svg")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {len(report.HEAD) + 1}
    assert "![" in text
    assert "cpu: some" in text


def test_json_holds_every_round() -> None:
    document = json.loads(
        report.to_json([make_row([1.0, 3.0], [4.0, 6.0], Target("micros", 3))], {}, {"budget": 1})
    )
    (row,) = document["results"]
    assert row["peers"]["fdshare"]["rounds"] == [1.0, 3.0]
    assert row["times_faster"] == 3.0
    assert row["target"] == {"kind": "micros", "bound": 3}
    assert row["target_met"] is False


def test_chart_bars_start_at_one_and_grow_with_the_ratio() -> None:
    rows = [
        make_row([1.0], [10.0], Target("faster", 8), title="ten & more"),
        make_row([1.0], [100.0], title="hundred"),
        make_row([2.0], [1.0], title="half"),
        make_row([1.0], [], title="nothing"),
    ]
    root = ET.fromstring(chart.to_svg(rows, "note <1>"))
    bars = [bar for bar in root.iter(SVG + "rect") if bar.get("class") in ("faster", "slower")]
    starts, widths = ([float(bar.attrib[name]) for bar in bars] for name in ("x", "width"))
    assert [bar.get("class") for bar in bars] == ["faster", "faster", "slower"]
    (one,) = [float(line.attrib["x1"]) for line in root.iter(SVG + "line") if line.get("class") == "one"]
    assert starts[:2] == [one, one]
    assert starts[2] + widths[2] == pytest.approx(one, abs=0.2)
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.3)  # a logarithmic axis: two decades against one
    texts = [element.text for element in root.iter(SVG + "text")]
    assert {"10.0×", "100×", "0.50×", "ten & more", "note <1>"} <= set(texts)
    assert len([line for line in root.iter(SVG + "line") if line.get("class") == "target"]) == 1


@pytest.mark.parametrize(("smallest", "low"), [(3.0, 1.0), (0.9, 0.5), (0.3, 0.2), (0.11, 0.1), (0.07, 0.05)])
def test_chart_axis_begins_at_a_gridline(smallest: float, low: float) -> None:
    assert chart.bounds([smallest, 7.0]) == pytest.approx((low, 7.0))


def test_chart_ticks_stay_few_and_include_one() -> None:
    for high in (2.0, 30.0, 5000.0, 1e6):
        found = chart.ticks(0.5, high)
        assert 1.0 in found
        assert len(found) <= chart.MAX_TICKS


def test_machine_facts_hold_no_paths_and_no_builder() -> None:
    facts = machine.facts()
    assert {"date", "cpu", "system", "python"} <= set(facts)
    assert str(ROOT) not in " ".join(facts.values())
    assert machine.kernel_version("6.1.0-19-cloud-amd64") == "6.1.0"
    assert machine.kernel_version("strange") == "unknown"
