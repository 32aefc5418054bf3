"""Check the source references of pages: `python tests/references.py [--mirror FOLDER] [PAGE ...]`.

A reference is a code span `KEY/PATH:LINE ANCHOR`: the anchor stands on that line of the file. The keys are the rows of
a table `| key | source | version | path |` in PAGES[0]: a GitHub repository with its commit, an installed package as
`==VERSION`, or this repository, whose references have no line (`KEY/PATH ANCHOR`). A key whose path is a file is
followed by no path (`KEY:LINE ANCHOR`); a `"` repeats the row above. An anchor has four letters at least.
FOLDER holds clones, as OWNER+NAME/repo or NAME. What is not there, or installed in another version, is printed as
skipped. Exit code 1: a reference is wrong.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError, run_tool

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/comparison/nemo_vs_axolotl_cp.md", "docs/best_practices.md")
HEADER = "| key | source | version | path |"
OWN = "this repository"


class Unavailable(Exception):
    """A source that cannot be read here; the message says which and why."""


@dataclass(frozen=True)
class Source:
    """A row of the table of sources; `version` is a commit, `==VERSION` of a package, or empty for our own tree."""

    key: str
    name: str
    version: str
    path: str


@dataclass(frozen=True)
class Reference:
    source: Source
    path: str
    line: int | None
    anchor: str

    def __str__(self) -> str:
        path, line = f"/{self.path}" if self.path else "", f":{self.line}" if self.line else ""
        return f"{self.source.key}{path}{line} {self.anchor}"


def read_sources(page: str) -> dict[str, Source]:
    """Rows of the table of sources, by key.

    Raises:
        UserError: no such table.
    """
    if HEADER not in page:
        raise UserError(f"{PAGES[0]}: no table {HEADER}")
    sources: dict[str, Source] = {}
    name = version = ""
    for row in page.split(HEADER)[1].splitlines()[2:]:
        if not row.startswith("|"):
            break
        key, *cells, path = (cell.strip(" `") for cell in row[1:-1].split("|"))
        name, version = (above if cell == '"' else cell for cell, above in zip(cells, (name, version), strict=True))
        sources[key] = Source(key, name, version, path)
    return sources


def find_references(page: str, sources: dict[str, Source]) -> Iterator[Reference | str]:
    """References of a page, and as a string what begins like one without being one."""
    prose = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        key = re.split(r"/|:(?=\d)", span)[0]
        if key == span or key not in sources:
            continue
        match = re.fullmatch(r"(?:/([\w./+-]*\w))?(?::(\d+))? ((?:\S *){4,})", span.removeprefix(key))
        if match is None or (match[2] is None) != (sources[key].name == OWN):
            yield f"`{span}` is not KEY/PATH:LINE ANCHOR"
        else:
            yield Reference(sources[key], match[1] or "", int(match[2]) if match[2] else None, match[3])


def find_clone(mirror: Path | None, source: Source) -> Path:
    """Folder of git that has the commit of a source.

    Raises:
        Unavailable: there is none.
    """
    if mirror is None:
        raise Unavailable(f"{source.name}: give PEERS_MIRROR, a folder of clones")
    folders = [mirror / source.name.replace("/", "+") / "repo", mirror / source.name.split("/")[-1]]
    for folder in folders:
        known = ["git", "-C", str(folder), "cat-file", "-e", source.version]
        if folder.is_dir() and not subprocess.run(known, check=False, capture_output=True).returncode:
            return folder
    raise Unavailable(f"{source.name}: no clone with {source.version[:12]} in {mirror}")


def reader(mirror: Path | None) -> Callable[[Source, str], list[str] | None]:
    """Lines of a file of a source; None: the source has no such file. The function raises Unavailable."""

    @cache
    def read(source: Source, path: str) -> list[str] | None:
        inside = str(PurePosixPath(source.path) / path)
        if re.fullmatch(r"[0-9a-f]{12,40}", source.version):
            shown = ["git", "-C", str(find_clone(mirror, source)), "show", f"{source.version}:{inside}"]
            result = subprocess.run(shown, check=False, capture_output=True)
            return None if result.returncode else result.stdout.decode(errors="replace").splitlines()
        file = ROOT / inside
        if source.name != OWN:
            try:
                package = metadata.distribution(source.name)
            except metadata.PackageNotFoundError:
                raise Unavailable(f"{source.name}: not installed") from None
            if (found := package.version.split("+")[0]) != source.version.removeprefix("=="):
                raise Unavailable(f"{source.name}: {found} is installed, not {source.version}")
            file = Path(str(package.locate_file(inside)))
        return file.read_text().splitlines() if file.is_file() else None

    return read


def find_fault(reference: Reference, lines: list[str] | None) -> str | None:
    """What is wrong with a reference to a file of these lines."""
    if lines is None:
        return f"{reference}: no such file"
    at = [number for number, line in enumerate(lines, 1) if reference.anchor in line]
    if not at:
        return f"{reference}: the file has no such words"
    if reference.line is None or reference.line in at:
        return None
    return f"{reference}: stands on line {min(at, key=lambda number: abs(number - (reference.line or 0)))}"


def check(pages: dict[str, str], mirror: Path | None) -> tuple[list[str], Counter[str], Counter[str]]:
    """Faults of all pages; references checked, by source; references skipped, by reason."""
    sources = read_sources(pages[PAGES[0]])
    read = reader(mirror)
    faults, checked, skipped = [], Counter[str](), Counter[str]()
    for name, page in pages.items():
        for reference in find_references(page, sources):
            if isinstance(reference, str):
                faults.append(f"{name}: {reference}")
                continue
            try:
                fault = find_fault(reference, read(reference.source, reference.path))
            except Unavailable as reason:
                skipped[str(reason)] += 1
                continue
            checked[reference.source.name] += 1
            faults += [f"{name}: {fault}"] if fault else []
    return faults, checked, skipped


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"beside {PAGES[0]}; default: {PAGES[1]}")
    parser.add_argument("--mirror", type=Path, metavar="FOLDER", help="folder of clones; without: those are skipped")
    options = parser.parse_args(argv)
    names = [PAGES[0], *(options.pages or [page for page in PAGES[1:] if (ROOT / page).exists()])]
    faults, checked, skipped = check({name: (ROOT / name).read_text() for name in names}, options.mirror)
    for name, count in sorted(checked.items()):
        print(f"checked {count:4} references to {name}")
    for reason, count in sorted(skipped.items()):
        print(f"skipped {count:4} references to {reason}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(run_tool(main))
