"""tools/report.py: what the page says of a run, that spikes stay, and that a run's texts are only texts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools.charts import Chart, Curve, downsample, log_ticks, render, smooth, tick_label, ticks
from tools.report import build_report, main, read_run, short_names

ROOT = Path(__file__).resolve().parent.parent.parent
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "br", "input", "img", "link"}


class Page(HTMLParser):
    """A page's tables (row's name -> cells), tags, scripts and texts; fails where tags don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data
        if "script" in self.open:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)

    def charts(self) -> dict[str, dict]:
        """Title -> the data behind the chart."""
        facts = json.loads(next(text for attrs, text in self.scripts if attrs.get("type") == "application/json"))
        titles = [attrs["aria-label"] for tag, attrs in self.tags if tag == "svg"]
        return dict(zip(titles, facts["charts"], strict=True))


def write_run(
    folder: Path, *, steps: int = 6, extra: str = "", config: dict | None = None, status: dict | None = None, **fields
) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 5.0 - step / 10,
            "grad_norm": 1.0,
            "lr": 0.01,
            "tokens": 1000,
            "step_time_s": 2.0,
        }
        record |= {"tokens_per_s": 100.0 if step == 1 else 500.0 + step, "mfu": None, "max_memory_bytes": step * 2**30}
        lines.append(json.dumps(record | {key: value(step) for key, value in fields.items()}))
        if step % 3 == 0:
            sources = {"web": {"loss": 1.0, "tokens": 5}, "code": {"loss": 2.0, "tokens": 5}}
            loss = 4.0 + step / 10
            lines.append(
                json.dumps({"step": step, "validation_loss": loss, "validation_tokens": 10, "validation": sources})
            )
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + extra)
    for name, facts in (("config.json", config), ("status.json", status)):
        if facts is not None:
            (folder / name).write_text(json.dumps(facts))
    return folder


def page_of(*folders: Path, out: Path) -> Page:
    assert main([*map(str, folders), "--out", str(out)]) == 0
    return Page(out.read_text("utf-8"))


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    config = {
        "flags": {"lr": 0.01, "train_iters": 9},
        "layout": {"pp": 1, "cp": 2},
        "parameters": 12345,
        "world_size": 2,
    }
    status = {
        "status": "failed",
        "step": 6,
        "reason": "rank 1 is gone",
        "time": "2026-01-02T03:04:05",
        "rank": 0,
        "host": "node7",
    }
    page = page_of(write_run(tmp_path / "a", config=config, status=status), out=tmp_path / "report.html")
    assert page.row("Final training loss") == ["4.40000 mean of the last 6: 4.65000"]
    assert page.row("Best validation loss") == ["4.30000 after step 3"]
    assert page.row("Tokens") == ["6,000"]
    assert page.row("Tokens/s, median") == ["504"]  # of steps 2 to 6
    assert page.row("MFU, median") == ["–"]
    assert page.row("Peak memory") == ["6.00 GiB"]
    assert page.row("Time in steps") == ["0.003 h 12 s"]
    assert page.row("Steps") == ["6 of 9"]
    assert page.row("Size") == ["12,345 parameters; 2 ranks (cp 2)"]
    assert page.row("Status") == ["failed at step 6 on rank 0 (node7): rank 1 is gone2026-01-02 03:04:05"]
    assert "MFU" in page.text.split("Not measured in this run:")[1].split(".")[0]


def test_curves_hold_what_was_measured(tmp_path: Path) -> None:
    timers = json.dumps({"step": 6, "timed_steps": 3, "timers": {"forward-backward": [0.1, 0.6, 1]}}) + "\n"
    charts = page_of(write_run(tmp_path / "a", extra=timers), out=tmp_path / "report.html").charts()
    training, validation = charts["Loss by tokens"]["curves"]
    assert training["x"] == [1000, 2000, 3000, 4000, 5000, 6000] and training["y"] == [4.9, 4.8, 4.7, 4.6, 4.5, 4.4]
    assert validation["kind"] == "dots" and validation["x"] == [3000, 6000] and validation["y"] == [4.3, 4.6]
    assert charts["Loss by step"]["curves"][1]["x"] == [3, 6]
    assert charts["Perplexity on code"]["curves"][0]["y"] == pytest.approx([math.exp(2)] * 2, rel=1e-5)
    assert charts["Peak memory"]["curves"][0]["y"] == [1, 2, 3, 4, 5, 6]
    assert charts["forward-backward"]["curves"][0]["y"] == [200]
    assert "MFU" not in charts


def test_two_runs_and_what_differs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "x" / "run", config={"flags": {"lr": 0.01, "seed": 7, "cp_size": 1}})
    second = write_run(tmp_path / "y" / "run", config={"flags": {"lr": 0.02, "seed": 7}}, loss=lambda step: 3.0)
    bare = write_run(tmp_path / "bare")
    page = page_of(first, second, bare, out=tmp_path / "report.html")
    assert page.rows[0][1:] == ["x/run", "y/run", "tmp/bare".replace("tmp", tmp_path.name)]
    assert page.row("Final training loss")[1].startswith("3.00000")
    best = [attrs.get("class") for tag, attrs in page.tags if tag == "td"][6:9]  # after Status and Steps
    assert best == ["", "best", ""]
    assert page.row("lr") == ["0.01", "0.02", "–"] and page.row("cp_size") == ["1", "–", "–"]
    assert "seed" not in [row[0] for row in page.rows]
    assert "The same in all of them (1)seed7" in page.text
    assert (
        "no config.json, so its flags are not known" in page.text
        and "not known: no status.json" in page.row("Status")[2]
    )
    assert {curve["run"] for curve in page.charts()["Learning rate"]["curves"]} == {0, 1, 2}


def test_texts_of_a_run_do_not_run(tmp_path: Path) -> None:
    config = {
        "flags": {EVIL: EVIL, "other": "a"},
        "layout": EVIL,
        "versions": {EVIL: [EVIL]},
        "world_size": EVIL,
        "parameters": EVIL,
    }
    status = dict.fromkeys(("status", "reason", "time", "host", "rank", "step"), EVIL)
    evil = json.dumps({"step": 7, "timers": {EVIL: [1, 2, 3]}}) + "\n"
    evil += json.dumps({"step": 7, "validation_loss": 1.0, "validation": {EVIL: {"loss": 1.0}}}) + "\n"
    folders = [
        write_run(tmp_path / name, extra=evil, config=config, status=status)
        for name in ("<script>alert(3)<", "{data} {title}")
    ]
    (folders[1] / "config.json").write_text(json.dumps(config | {"flags": {EVIL: "b" + EVIL}}))
    page = page_of(*folders, out=tmp_path / "report.html")
    assert [attrs for attrs, _ in page.scripts] == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert {EVIL, f"Perplexity on {EVIL.split('/')[-1]}"} <= set(page.charts())  # a source's name is taken for a path
    assert page.row(EVIL) == [EVIL, "b" + EVIL]  # told, as text
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    page_of(write_run(tmp_path / "a"), out=out)
    text = out.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_a_broken_last_line_is_counted(tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "a", extra='{"step": 7, "loss": 1.')
    page = page_of(folder, out=tmp_path / "report.html")
    assert page.row("Remarks") == ["1 unreadable line of metrics.jsonl left out: 9"]
    assert page.row("Steps") == ["6"] and "1 unreadable" in capsys.readouterr().out


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 7, "loss": {HUGE}}}',
        f'{{"step": {HUGE}, "loss": 1.0}}',
        '{"step": 9007199254740992, "loss": 1.0}',
        f'{{"step": 7, "loss": 1.0, "tokens": {HUGE}}}',
        '{"step": 7, "loss": 1.0, "tokens": 1.7e308}',
        '{"step": 7, "loss": 1.0, "tokens": 9007199254740000}',  # 6000 were counted before
        '{"step": 7, "loss": 1.0, "tokens": Infinity}',
        '{"step": 7, "loss": 1.0, "tokens": NaN}',
        '{"step": 7, "loss": 1.0, "tokens": -1}',
        '{"step": 7, "loss": -1.7e308}',
        f'{{"step": 7, "validation_loss": {HUGE}}}',
        f'{{"step": 7, "validation_loss": 1.0, "validation": {{"web": {{"loss": {HUGE}}}}}}}',
        f'{{"step": 7, "timers": {{"all": [0, {HUGE}, 0]}}}}',
        "[" * 100_000 + "]" * 100_000,
        '{"step": 7, "loss": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001,
    ],
    ids=lambda line: line[:40],
)
def test_numbers_and_depths_that_nothing_can_be_made_of_are_no_record(line: str, tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a", extra=line + "\n" + line + "\n"), out=tmp_path / "report.html")
    assert page.row("Remarks") == ["2 unreadable lines of metrics.jsonl left out: 9, 10"]
    assert page.row("Steps") == ["6"] and page.row("Tokens") == ["6,000"]


def test_token_sums_stay_below_what_a_float_tells_apart(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a", tokens=lambda step: 2**52), out=tmp_path / "report.html")
    assert page.row("Tokens") == [f"{2**52:,}"] and page.row("Remarks")[0].startswith("5 unreadable lines")


def test_large_losses_that_a_run_can_have_stay(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a",
        loss=lambda step: 3.4e38 if step == 3 else 2.0,
        grad_norm=lambda step: 1e300 if step == 4 else 1.0,
    )
    page = page_of(folder, out=tmp_path / "report.html")
    assert page.row("Remarks") == ["–"] and max(page.charts()["Loss by step"]["curves"][0]["y"]) == 3.4e38


@pytest.mark.parametrize("name", ["config.json", "status.json"])
@pytest.mark.parametrize("depth", [985, 990, 100_000])
def test_facts_nested_deeply_do_not_end_in_a_traceback(name: str, depth: int, tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a", config={"flags": {"train_iters": int(HUGE)}, "parameters": int(HUGE)}, status={"status": "done"}
    )
    assert main([str(folder)]) == 0
    (folder / name).write_text('{"status": ' + "[" * depth + "]" * depth + "}")
    assert main([str(folder)]) in (0, 2)


def test_what_is_not_finite_is_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", loss=lambda step: math.nan if step == 3 else math.inf if step == 6 else 2.0)
    page = page_of(folder, out=tmp_path / "report.html")
    assert page.row("Remarks") == ["2 steps with a loss or gradient norm that is not finite"]
    assert page.row("Final training loss") == ["inf mean of the 4 finite of the last 6: 2.00000"]
    assert page.charts()["Loss by step"]["curves"][0]["y"] == [2.0, 2.0, "nan", 2.0, 2.0, "inf"]
    figure = (tmp_path / "report.html").read_text("utf-8").split("</figure>")[0]
    assert figure.count('class="mark r0 c0"') == 2
    line = re.findall(r'class="line r0 c0"[^>]* d="([^"]*)"', figure)
    assert line[0].count("M") == 2 and "nan" not in line[0] and "inf" not in line[0]


@pytest.mark.parametrize("made", ["nothing", "an empty file", "no record"])
def test_a_folder_without_metrics_is_refused_in_one_line(made: str, tmp_path: Path) -> None:
    if made != "nothing":
        (tmp_path / "metrics.jsonl").write_text("" if made == "an empty file" else "[1, 2]\n{\n")
    command = [sys.executable, "tools/report.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "metrics.jsonl" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_the_default_place_and_a_run_given_twice(tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "a")
    assert main([str(folder)]) == 0 and (folder / "report.html").is_file()
    assert main([str(folder), str(folder / ".." / "a")]) == 2 and "given twice" in capsys.readouterr().err
    assert main([str(folder), "--out", str(tmp_path / "no" / "such.html")]) == 2


def test_a_config_that_is_no_json_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", status={"status": "running", "step": 3})
    (folder / "config.json").write_text("{")
    page = Page(build_report([read_run(folder, "a")], now="now"))
    assert "config.json is not JSON" in page.text and "a run that was killed stays" in page.row("Status")[0]


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path: Path) -> None:
    losses = [3.0 + math.sin(step) / 10 for step in range(100_000)]
    losses[54_321], losses[77_777], losses[99_990] = 9.0, 0.5, math.nan
    points = downsample(list(enumerate(losses)))
    assert len(points) <= 1502 and points == sorted(points)
    assert {(54_321, 9.0), (77_777, 0.5), (0, losses[0]), (99_999, losses[-1])} <= set(points)
    assert [x for x, y in points if math.isnan(y)] == [99_990]
    assert downsample(points[:10]) == points[:10]


def test_smoothing() -> None:
    assert smooth([(x, 0.97) for x in range(500)], 50) == [
        (x, 0.97) for x in range(500)
    ]  # no start value pulls, nothing rounds
    broken = smooth([(0, 1.0), (1, math.nan), (2, 1.0)], 3)
    assert broken[0] == (0, 1.0) and math.isnan(broken[1][1]) and broken[2] == (2, 1.0)
    jump = smooth([(x, float(x >= 60)) for x in range(120)], 10)
    assert jump[59][1] == 0 and jump[60][1] == pytest.approx(2 / 11) and jump[119][1] > 0.999
    falling = smooth([(x, 10 * math.exp(-x / 20)) for x in range(1000)], 100)
    assert falling[40][1] < 3  # where the value is 1.35; over 100 points it would be above 5


def test_a_flat_curve_is_not_blown_up() -> None:
    _, facts = render(Chart("Packing", "", "step", [Curve(0, "line", [(0, 0.97), (1, math.nextafter(0.97, 1))])]), 0)
    assert facts["y"][1] - facts["y"][0] > 0.05


def test_ticks_are_round() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] and ticks(-0.3, 0.9, 6) == pytest.approx(
        [-0.2, 0, 0.2, 0.4, 0.6, 0.8]
    )
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000] and log_ticks(1, 6) == [1, 2, 5]
    labels = [
        tick_label(*case)
        for case in ((0, 1), (1500, 500), (20_000, 5000), (2.5e6, 5e5), (0.25, 0.25), (3e-4, 1e-4), (1.0, 0.05))
    ]
    assert labels == ["0", "1,500", "20k", "2.5M", "0.25", "3e-4", "1.00"]


@pytest.mark.parametrize(
    "points",
    [[(1, 0.0)], [(1, math.nan)], [(5, 2.0), (6, 2.0)], [(0, -1e-30), (1, 1e30)]],
    ids=["one", "nan", "flat", "far apart"],
)
@pytest.mark.parametrize("may_log", [True, False])
def test_odd_curves_are_drawn(points: list, may_log: bool) -> None:
    text, facts = render(Chart("a", "", "step", [Curve(0, "line", points)], may_cap=True, may_log=may_log), 0)
    Page(text)
    assert "nan " not in text and facts["y"][0] < facts["y"][1] and facts["x"][0] < facts["x"][1]


def test_an_outlier_leaves_the_frame_and_is_marked() -> None:
    points = [(x, 500.0 if x == 0 else 1.0) for x in range(100)]
    text, facts = render(Chart("Step time", "s", "step", [Curve(0, "line", points)], from_zero=True, may_cap=True), 0)
    assert facts["y"][1] < 2 and text.count('class="beyond r0 c0"') == 1 and "step 0: 500" in text
    assert facts["curves"][0]["y"][0] == 500


def test_names_are_as_long_as_they_must() -> None:
    assert short_names(["/a/x", "/b/y"]) == ["x", "y"]
    assert short_names(["/a/1/x", "/b/1/x"]) == ["a/1/x", "b/1/x"]
    assert short_names(["x"]) == ["x"]
