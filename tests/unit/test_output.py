"""What reaches a terminal, a pipe or a file: no control character, no credential, no traceback of the stream's."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.cli import parse_arguments
from data.prepare import main as prepare
from metrics.reports import configuration
from runtime.status import StatusFile
from tests.launch import ROOT, environment
from tests.unit.test_run_log import CONFIG
from utils.logger import SafeOutput, one_line
from utils.names import redact

FILES = [ROOT / "train.py", ROOT / "data" / "prepare.py", *sorted((ROOT / "tools").glob("*.py"))]
ENTRY_POINTS = [path for path in FILES if "__main__" in path.read_text()]


def written(*texts: str, encoding: str = "utf-8") -> str:
    """What a stream of this encoding holds after these writes."""
    place = io.BytesIO()
    out = SafeOutput(io.TextIOWrapper(place, encoding), 141)
    for text in texts:
        assert out.write(text) == len(text)
    return place.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\n\u4e2d\U0001f600", "a\tb\n\u4e2d\U0001f600"),
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),  # fills the clipboard
        ("\x9b31m \x7f\x00", "\\x9b31m \\x7f\\x00"),
        ("name\u202egpj.exe", "name\\u202egpj.exe"),
        ("line\rover it\x08", "line\\rover it\\x08"),
        ("\r\x1b[K[###] step 1\r", "\r\x1b[K[###] step 1\\r"),  # our bar
        ("\r 10%|#", "\r 10%|#"),  # tqdm's
        ("\udcff", "\\udcff"),  # a byte of a file's name that is not UTF-8
        ("reads https://me:pw@host/a", "reads https://***@host/a"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert written(text) == shown


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "\\xe9 \\u65e5"), ("latin-1", "\xe9 \\u65e5")])
def test_an_encoding_may_lack_characters(encoding: str, shown: str) -> None:
    assert written("\xe9 \u65e5", encoding=encoding) == shown


@pytest.mark.parametrize("code", [None, 141])
def test_output_that_cannot_be_written_is_discarded(code: int | None) -> None:
    """A run goes on; a tool ends, and says why unless the reader went away."""
    with open("/dev/full", "w") as full, contextlib.ExitStack() as stack:
        out = SafeOutput(full, code)
        out.write("lost")
        if code:
            stack.enter_context(pytest.raises(SystemExit, match="No space left"))
        out.flush()
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == "/dev/null"


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.name)
def test_every_entry_point_guards_its_output(path: Path) -> None:
    """Those that are started below are slow examples of all."""
    called = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if is_call(node)}
    assert called & {"run_tool", "guard_output"}


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def started(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, timeout=100, check=False, **options
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_is_no_traceback(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    flags = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "\u65e5"), "--workers", "0"]
    variables = environment() | {"PYTHONIOENCODING": encoding}
    result = started("-m", "data.prepare", *flags, "--tokenizer-type", "byte", env=variables, stdout=subprocess.PIPE)
    assert result.returncode == 0 and b"\\u65e5.bin" in result.stdout and b"Traceback" not in result.stderr


@pytest.mark.parametrize(("command", "code"), [("train.py", 0), ("tools/plan.py", 141), ("data/prepare.py", 141)])
def test_a_reader_that_goes_away_is_no_traceback(command: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    gone = started(command, "--help", stdout=writer, env=environment() | {"PYTHONPATH": str(ROOT)})
    os.close(writer)
    assert gone.returncode == code and gone.stderr == b""


def test_closed_streams_are_no_traceback() -> None:
    command = (
        f"{sys.executable} data/prepare.py --help >&-; echo $?; {sys.executable} data/prepare.py >&- 2>&-; echo $?"
    )
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, shell=True, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("0\n2\n", "")


# ---------------------------------------------------------------------------------------------------
# Credentials

SECRETS = [
    ("s3://KEY:hun/ter2@bucket/x", "s3://***@bucket/x"),
    ("https://user:hunter2@host:8080/x", "https://***@host:8080/x"),
    ("https://hunter2@host/x", "https://***@host/x"),
    ("simplecache::ftp://me:hunter2@host", "simplecache::ftp://***@host"),
    ("https://h/x?a=1&X-Amz-Signature=hunter2&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
    ("https://h/x?sig=hunter2#top", "https://h/x?sig=***#top"),
    ("gs://b/x?access_token=hunter2 and gs://b/y?token=hunter2", "gs://b/x?access_token=*** and gs://b/y?token=***"),
]
NO_SECRETS = [
    "abfs://box@account.dfs.core.windows.net/x",
    "http://host:8080/a@b",
    "s3://bucket/x?versionId=3",
    "user:name@host",
    "hdfs://me@host/x",
]


@pytest.mark.parametrize(("text", "shown"), [*SECRETS, *((text, text) for text in NO_SECRETS)])
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert json.loads(redact(json.dumps([text, "://a@b"])))[0] == shown


def test_hiding_takes_no_time() -> None:
    for part in ("://", "://:", "?key", "https://a", "://a:b"):
        redact(f"{part * 20_000} ://")


def test_files_of_a_run_hold_no_credentials(tmp_path: Path) -> None:
    words = [url for url, _ in SECRETS]
    config = parse_arguments(["--data-path", *words, "--tensorboard-dir", words[0]])
    told = configuration(config, ["--data-path", *words], CONFIG, world_size=1)
    assert "hunter2" not in json.dumps(told) and told["flags"]["data_path"][0] == "s3://***@bucket/x"
    StatusFile(tmp_path / "status.json", "x", 0).write("failed", step=0, reason=f"no such file {words[1]}")
    assert "hunter2" not in (tmp_path / "status.json").read_text()


def test_a_reason_that_a_script_prints_is_safe() -> None:
    """slurm.sbatch prints the reason of status.json."""
    assert one_line(OSError("no\x1b]0;x\x07 file\nhttps://a:b@h")) == "no\\x1b]0;x\\x07 file https://***@h"


def test_a_corpus_holds_no_credentials(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/in/a.jsonl", b'{"text": "a"}\n')
    flags = ["--output-prefix", str(tmp_path / "p"), "--tokenizer-type", "byte", "--workers", "0"]
    assert prepare(["--input", "memory://in/a.jsonl", *flags]) == 0
    assert "memory://" in (tmp_path / "p.json").read_text()
