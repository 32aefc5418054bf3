"""tools/report.py: contents of the page, spikes that stay, hostile texts of a run, links out of a run."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from metrics.reports import read_starts
from tools.report import average, downsample, main, needs_log_axis
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """A page's tables (name of a row -> cells), tags, scripts and texts; fails where tags don't nest."""

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

    def figure(self) -> tuple[list[dict], dict]:
        """Traces and layout that the page gives to plotly."""
        call = re.search(r'Plotly\.newPlot\(\s*"charts",\s*', self.scripts[-1][1])
        assert call
        traces, end = json.JSONDecoder().raw_decode(self.scripts[-1][1], call.end())
        layout, _ = json.JSONDecoder().raw_decode(self.scripts[-1][1], self.scripts[-1][1].index("{", end))
        return traces, layout

    def charts(self) -> dict[str, list[dict]]:
        """Title -> traces, in order of runs."""
        traces, layout = self.figure()
        titles = [unescape(re.findall("<b>(.*)</b>", each["text"])[0]) for each in layout["annotations"]]
        charts: dict[str, list[dict]] = {title: [] for title in titles}
        assert len(charts) == len(titles)
        for trace in traces:
            charts[titles[int(trace["xaxis"][1:] or 1) - 1]].append(trace)
        return charts


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
    assert page.row("Final training loss") == ["4.40000"]
    assert page.row("Final training loss, mean of 20 steps") == ["4.65000"]
    assert page.row("Best validation loss") == ["4.30000"]
    assert page.row("Tokens") == ["6,000"]
    assert page.row("Tokens/s, median") == ["504"]  # of steps 2 to 6
    assert page.row("MFU, median") == ["–"]
    assert page.row("Peak memory, GiB") == ["6.00"]
    assert page.row("Time in steps, hours") == ["0.003"]
    assert page.row("Steps") == ["6"] and page.row("Steps wanted") == ["9"]
    assert page.row("parameters") == ["12345"] and page.row("world_size") == ["2"]
    assert page.row("layout") == ['{"pp": 1, "cp": 2}']
    assert page.row("Status") == ["failed: rank 1 is gone"]


def test_curves_hold_what_was_measured(tmp_path: Path) -> None:
    timers = json.dumps({"step": 6, "timed_steps": 3, "timers": {"forward-backward": [0.1, 0.6, 1]}}) + "\n"
    charts = page_of(write_run(tmp_path / "a", extra=timers), out=tmp_path / "report.html").charts()
    training, validation = charts["Loss"]
    assert training["x"] == [1, 2, 3, 4, 5, 6] and training["y"] == [4.9, 4.8, 4.7, 4.6, 4.5, 4.4]
    assert validation["mode"] == "markers" and validation["x"] == [3, 6] and validation["y"] == [4.3, 4.6]
    assert training["name"] == "a" and validation["name"] == "a, validation"
    assert charts["perplexity/code"][0]["y"] == pytest.approx([math.exp(2)] * 2, rel=1e-5)
    assert charts["Memory"][0]["y"] == [1, 2, 3, 4, 5, 6]
    assert charts["timer/forward-backward, ms per step of the slowest rank"][0]["y"] == [200]
    assert "MFU" not in charts


def test_every_measure_has_a_chart(tmp_path: Path) -> None:
    more = [
        "skipped_steps",
        "tflops_per_rank",
        "mfu",
        "data_share",
        "cp_wait_share",
        "packing_efficiency",
        "cp_balance",
    ]
    folder = write_run(tmp_path / "a", **{name: lambda step: 0.5 for name in more})
    page = page_of(folder, out=tmp_path / "report.html")
    wanted = "Gradient norm,Learning rate,Skipped steps,Throughput,TFLOP/s,MFU,Step time,Data,CP wait,Memory"
    assert {*wanted.split(","), "Packing", "CP balance"} <= set(page.charts())
    assert page.charts()["CP wait"][0]["y"] == [50] * 6


def test_two_runs_and_what_differs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "x" / "run", config={"flags": {"lr": 0.01, "seed": 7, "cp_size": 1}})
    second = write_run(tmp_path / "y" / "run", config={"flags": {"lr": 0.02, "seed": 7}}, loss=lambda step: 3.0)
    bare = write_run(tmp_path / "bare")
    page = page_of(first, second, bare, out=tmp_path / "report.html")
    assert page.rows[0][1:] == ["x/run", "y/run", f"{tmp_path.name}/bare"]
    assert page.row("Final training loss")[1] == "3.00000"
    assert page.row("--lr") == ["0.01", "0.02", "–"] and page.row("--cp-size") == ["1", "–", "–"]
    differs, equal = page.text.split("Differs between runs")[1].split("Equal in all")
    assert "--lr" in differs and "--seed" not in differs and "--seed" in equal and "--lr" not in equal
    assert (
        f"{tmp_path.name}/bare: config.json is left out: {bare}/config.json cannot be read: No such file" in page.text
    )
    assert page.row("Status") == ["–"] * 3
    traces, _ = page.figure()
    legend = [(trace["name"], trace["legendgroup"]) for trace in traces if trace["showlegend"]]
    names = [("x/run", "0"), ("y/run", "1"), (f"{tmp_path.name}/bare", "2")]
    assert legend == [(name + kind, group) for name, group in names for kind in ("", ", validation")]
    assert [trace["legendgroup"] for trace in page.charts()["Learning rate"]] == ["0", "1", "2"]
    assert len({trace["line"]["color"] for trace in page.charts()["Learning rate"]}) == 3


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
    assert len(page.scripts) == 3 and "alert(" not in page.scripts[0][1] + page.scripts[1][1]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert {f"timer/{EVIL}, ms per step of the slowest rank", f"perplexity/{EVIL}"} <= set(page.charts())
    assert page.row(f"--{EVIL}") == [EVIL, "b" + EVIL]
    assert page.row("versions") == [json.dumps({EVIL: [EVIL]})] * 2
    traces, layout = page.figure()
    assert all("<" not in trace["name"] for trace in traces)
    assert all(
        set(re.findall("<[^ >]*", each["text"])) == {"<b", "</b", "<span", "</span"} for each in layout["annotations"]
    )


def test_layouts_of_a_run_in_the_order_of_its_starts(tmp_path: Path) -> None:
    starts = [(0, {"pp": 1, "cp": 2}), (3, {"pp": 1, "cp": 1}), (4, {"pp": 1, "cp": 1}), (5, {"pp": 2, "cp": 2})]
    config = {"flags": {}, "starts": [{"step": step, "layout": layout} for step, layout in starts]}
    folders = write_run(tmp_path / "a", config=config), write_run(tmp_path / "b", config={"flags": {}, "starts": [1]})
    page = page_of(*folders, out=tmp_path / "report.html")
    assert page.row("Layout") == ["cp 2; one rank from step 3; pp 2 x cp 2 from step 5", "–"]


def test_a_run_that_changed_course_is_marked(tmp_path: Path) -> None:
    """A line across all charts where it changed, and what changed in the table."""
    layout = {"cp": 2}
    starts = [
        {"step": 0, "layout": layout, "changed": []},
        {
            "step": 4,
            "layout": layout,
            "changed": ["--data-path: b is new", "--global-batch-size 8 (the checkpoint: 4)"],
        },
    ]
    phase = json.dumps({"step": 2, "changed": "--data-path: from sample 4 on 100.0000% c"}) + "\n"
    folders = [write_run(tmp_path / "a", config={"flags": {}, "starts": starts}, extra=phase)]
    folders += [
        write_run(tmp_path / name, config={"flags": {}, "starts": wrong}) for name, wrong in (("b", 3), ("c", [[]]))
    ]
    page = page_of(*folders, out=tmp_path / "report.html")
    changes = ["from step 2: --data-path: from sample 4 on 100.0000% c"]
    changes += [f"from step 4: {line}" for line in starts[1]["changed"]]
    assert page.row("Changed")[0] == "; ".join(changes)
    lines = [shape for shape in page.figure()[1]["shapes"] if shape["type"] == "line"]
    assert {line["x0"] for line in lines} == {2, 4} and len(lines) == 2 * len(page.charts())


def test_a_resumed_run_keeps_its_earlier_starts(tmp_path: Path) -> None:
    file, layout = tmp_path / "config.json", {"cp": 2}
    assert read_starts(file, 5) == []
    file.write_text(json.dumps({"layout": layout}))  # of a run before there were starts
    assert read_starts(file, 5) == [{"step": 0, "layout": layout}]
    file.write_text(json.dumps({"starts": [{"step": step, "layout": layout} for step in (0, 3, 5)]}))
    assert [start["step"] for start in read_starts(file, 5)] == [0, 3], "a start at the same step takes its place"
    for text in ("{", "[]", '{"starts": 1}'):
        file.write_text(text)
        assert read_starts(file, 5) == []


def test_runs_on_different_text_are_not_compared_silently(tmp_path: Path) -> None:
    flags = [{"data_path": ["x"], "lr": 1}, {"data_path": ["x"], "lr": 2}, {"data_path": ["y"], "lr": 1}]
    a, b, c = (write_run(tmp_path / name, config={"flags": own}) for name, own in zip("abc", flags, strict=True))
    note = "different text: --data-path differ"
    assert note not in page_of(a, b, out=tmp_path / "report.html").text
    assert note in page_of(a, b, c, out=tmp_path / "report.html").text


def test_few_steps_have_whole_numbers_on_their_axis(tmp_path: Path) -> None:
    for name, steps, tick in (("a", 6, 1), ("b", 40, None)):
        _, layout = page_of(write_run(tmp_path / name, steps=steps), out=tmp_path / "report.html").figure()
        assert layout["xaxis"].get("dtick") == tick


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"), out=tmp_path / "report.html")
    assert sum(text.count("plotly.js v") for _, text in page.scripts) == 1
    assert not [attrs for _, attrs in page.tags if {"src", "href", "integrity"} & set(attrs)]
    own = (tmp_path / "report.html").read_text("utf-8").replace(page.scripts[1][1], "")
    own = own.replace("https://plot.ly", "")  # where an uploaded chart would go: never, without a button
    assert not re.search(r"https?:|@import|url\(", own)


def test_a_broken_last_line_is_counted(tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "a", extra='{"step": 7, "loss": 1.')
    page = page_of(folder, out=tmp_path / "report.html")
    note = "a: metrics.jsonl: 1 unreadable lines left out, the first are [9]"
    assert note in page.text and note in capsys.readouterr().out and page.row("Steps") == ["6"]


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 7, "loss": {HUGE}}}',
        f'{{"step": {HUGE}, "loss": 1.0}}',
        '{"step": 9007199254740992, "loss": 1.0}',
        f'{{"step": 7, "loss": 1.0, "tokens": {HUGE}}}',
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
    assert "2 unreadable lines left out, the first are [9, 10]" in page.text
    assert page.row("Steps") == ["6"] and page.row("Tokens") == ["6,000"]


def test_huge_numbers_do_not_end_in_a_traceback(tmp_path: Path) -> None:
    fields = ("loss", "tokens", "step_time_s", "grad_norm", "validation_loss")
    more = "\n".join(json.dumps({"step": n, "loss": 1.0} | dict.fromkeys(fields, -1.7e308)) for n in (7, 8))
    more += "\n" + "\n".join(
        json.dumps({"step": n, "loss": v, "tokens": v}) for n, v in ((9, math.inf), (10, math.nan))
    )
    page = page_of(write_run(tmp_path / "a", extra=more), out=tmp_path / "report.html")
    assert page.row("Steps") == ["10"] and page.row("Tokens") == ["nan"] and "unreadable" not in page.text


def test_large_losses_that_a_run_can_have_stay(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a",
        loss=lambda step: 3.4e38 if step == 3 else 2.0,
        grad_norm=lambda step: 1e300 if step == 4 else 1.0,
    )
    page = page_of(folder, out=tmp_path / "report.html")
    assert "unreadable" not in page.text
    assert max(page.charts()["Loss"][0]["y"]) == 3.4e38


@pytest.mark.parametrize("name", ["config.json", "status.json"])
@pytest.mark.parametrize("depth", [985, 990, 100_000])
def test_facts_nested_deeply_do_not_end_in_a_traceback(name: str, depth: int, tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a", config={"flags": {"train_iters": int(HUGE)}, "parameters": int(HUGE)}, status={"status": "done"}
    )
    assert main([str(folder)]) == 0
    (folder / name).write_text('{"status": ' + "[" * depth + "]" * depth + "}")
    assert main([str(folder)]) == 0


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", loss=lambda step: math.nan if step == 3 else math.inf if step == 6 else 2.0)
    page = page_of(folder, out=tmp_path / "report.html")
    assert page.row("Losses, not finite") == ["2"] and page.row("Gradient norms, not finite") == ["0"]
    assert page.row("Final training loss") == ["inf"]
    assert page.row("Final training loss, mean of 20 steps") == ["2.00000"]
    assert page.charts()["Loss"][0]["y"] == [2.0, 2.0, None, 2.0, 2.0, None]


@pytest.mark.parametrize("made", ["nothing", "an empty file", "no record"])
def test_a_folder_without_metrics_is_refused_in_one_line(made: str, tmp_path: Path) -> None:
    if made != "nothing":
        (tmp_path / "metrics.jsonl").write_text("" if made == "an empty file" else "[1, 2]\n{\n")
    command = [sys.executable, "tools/report.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "metrics.jsonl" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_the_default_place_and_a_run_given_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert main([str(folder)]) == 0 and (folder / "report.html").is_file()
    with pytest.raises(UserError, match="given twice"):
        main([str(folder), str(folder / ".." / "a")])
    with pytest.raises(UserError, match=r"no/such\.html cannot be written: No such file"):
        main([str(folder), "--out", str(tmp_path / "no" / "such.html")])


def test_a_config_that_is_no_json_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", status={"status": "running", "step": 3})
    (folder / "config.json").write_text("{")
    page = page_of(folder, out=tmp_path / "report.html")
    assert (
        "config.json is left out: Expecting property name" in page.text
        and 'A killed run keeps the status "running"' in page.text
    )
    assert page.row("Status") == ["running"]


def test_a_report_replaces_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    folder, target = write_run(tmp_path / "a"), tmp_path / "elsewhere.html"
    target.write_text("keep")
    (folder / "report.html").symlink_to(target)
    assert main([str(folder)]) == 0
    assert target.read_text() == "keep" and not (folder / "report.html").is_symlink()
    assert "Plotly.newPlot" in (folder / "report.html").read_text("utf-8")
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["config.json", "status.json"])
def test_links_out_of_a_run_are_not_read(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"flags": {"password": "hunter2"}, "status": "hunter2"}))
    folder = write_run(tmp_path / "a")
    (folder / name).symlink_to(secret)
    page = page_of(folder, out=tmp_path / "report.html")
    assert "hunter2" not in page.text and "password" not in page.text
    assert f"{folder / name} cannot be read: is a link, which is not followed" in page.text
    (folder / name).unlink()
    (folder / name).write_text(secret.read_text())
    assert "hunter2" in page_of(folder, out=tmp_path / "report.html").text  # as a file of the run


def test_metrics_behind_a_link_or_in_a_pipe_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").rename(tmp_path / "m.jsonl")
    (folder / "metrics.jsonl").symlink_to(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="is a link, which is not followed"):
        main([str(folder)])
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: is no regular file"):
        main([str(folder)])
    assert not (folder / "report.html").exists()


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "a")
    assert main([str(folder)]) == 0
    before = (folder / "report.html").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        main([str(folder)])
    assert (folder / "report.html").read_bytes() == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_huge_run_is_small_and_quick(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=50_001)
    fields = [
        "tflops_per_rank",
        "mfu",
        "data_share",
        "cp_wait_share",
        "packing_efficiency",
        "cp_balance",
        "tokens_per_s",
    ]
    folder = write_run(tmp_path / "a", steps=50_000, **{name: lambda step: noise[step] for name in fields})
    out, started = tmp_path / "report.html", time.process_time()
    page = page_of(folder, out=out)
    assert time.process_time() - started < 10  # 3 s on an idle machine, the test's parser included
    assert out.stat().st_size < 6 * 2**20
    assert all(len(trace["x"]) <= 1502 for traces in page.charts().values() for trace in traces)


def test_long_runs_do_not_hide_each_other(tmp_path: Path) -> None:
    """Pale bands of all values first, then the means, of which the legend has one a run."""
    values = [lambda step: 2.0 + step % 2, lambda step: 2.2 + step % 2]
    folders = [write_run(tmp_path / name, steps=3000, loss=value) for name, value in zip("ab", values, strict=True)]
    page = page_of(*folders, out=tmp_path / "report.html")
    curves = [trace for trace in page.charts()["Loss"] if trace["mode"] == "lines"]
    assert [(c["opacity"], c["legendgroup"], c["showlegend"]) for c in curves] == [
        (0.3, "0", False),
        (0.3, "1", False),
        (1, "0", True),
        (1, "1", True),
    ]
    assert {min(c["y"]) for c in curves[:2]} == {2.0, 2.2} and {max(c["y"]) for c in curves[:2]} == {3.0, 3.2}
    assert set(curves[2]["y"]) == {2.5} and set(curves[3]["y"]) == {2.7}


def test_means_leave_out_what_is_not_finite() -> None:
    points = np.stack([np.arange(12.0), np.arange(12.0)], 1)
    points[1, 1], points[4:8, 1] = math.inf, math.nan
    assert np.array_equal(average(points, 3), [[5 / 3, 5 / 3], [4, math.nan], [9.5, 9.5]], equal_nan=True)


def test_a_long_curve_stays_small_and_keeps_its_spike() -> None:
    losses = 3.0 + np.sin(np.arange(100_000)) / 10
    losses[54_321], losses[77_777], losses[99_990] = 9.0, 0.5, math.nan
    points = downsample(np.stack([np.arange(100_000), losses], 1))
    assert len(points) <= 1502 and (np.diff(points[:, 0]) > 0).all()
    kept = set(map(tuple, points.tolist()))
    assert {(54_321, 9.0), (77_777, 0.5), (0, losses[0]), (99_999, losses[-1])} <= kept
    assert [x for x, y in kept if math.isnan(y)] == [99_990]
    assert np.array_equal(downsample(points[:10]), points[:10], equal_nan=True)


def test_rounding_noise_is_no_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", packing_efficiency=lambda step: 0.97 if step % 2 else math.nextafter(0.97, 1))
    (curve,) = page_of(folder, out=tmp_path / "report.html").charts()["Packing"]
    assert set(curve["y"]) == {97.0}


def test_an_axis_is_logarithmic_where_one_value_would_flatten_the_rest() -> None:
    assert needs_log_axis([1.0, 2.0, 2000.0]) and needs_log_axis([500.0] + [1.0] * 99)
    for values in ([], [0.0], [2.0, 2.0], [1.0, 2.0, 4.0], [0.0, 0.0, 9.0], [-1e-30, 1e30]):
        assert not needs_log_axis(values)
