"""The page says what was measured, what was missed, and nothing when a run came to nothing."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bench import plots, report
from bench.measure import Series
from bench.report import Section
from local.setup import PROJECT


def bench(*arguments: str, path: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m bench`, with another PATH."""
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=PROJECT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_page_has_tables_verdicts_and_pictures(tmp_path: Path) -> None:
    """Sections follow each other, and what was missed stands in front."""
    bar = Section("The bar")
    bar.say(f"One is {bar.verdict('GET: 1.9 floors', held=True)}, one {bar.verdict('POST: 2.8 floors', held=False)}.")
    bar.table(["what", "µs"], [["GET", "1"], ["POST", "2"]])
    bar.picture("cost", "What it costs", plots.bars("Cost", "µs", {"ours": Series([1.0, 2.0, 3.0])}))
    page = tmp_path / "page.md"

    report.write("- a machine", [bar, Section("Growth")], page)

    text = page.read_text(encoding="utf-8")
    assert "- a machine" in text
    assert text.index("**Bars missed in this run:**\n- POST: 2.8 floors\n") < text.index("## The bar")
    assert "One is met, one **missed**." in text
    assert "| what | µs |\n| --- | --- |\n| GET | 1 |\n| POST | 2 |\n" in text
    assert "![What it costs](benchmarks/cost.png)" in text
    assert text.index("## The bar") < text.index("## Growth")
    assert (tmp_path / "page" / "cost.png").exists()


def test_page_without_a_miss_says_so(tmp_path: Path) -> None:
    """All bars met is a statement, and not the absence of one."""
    bar = Section("The bar")
    bar.verdict("GET: 1.9 floors", held=True)

    report.write("- a machine", [bar], tmp_path / "page.md")

    assert "All bars met." in (tmp_path / "page.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["bars", "lines"])
def test_picture_is_a_png_of_a_readable_size(tmp_path: Path, kind: str) -> None:
    """The file that the page shows begins as PNG does, is wide enough for its letters and no poster."""
    rounds = Series([1.0, 2.0, 4.0])
    if kind == "bars":
        figure = plots.bars("Cost", "µs", {"ours": rounds, "floor": rounds})
    else:
        panel = plots.Panel("Rate", "1/s", "connections", [1, 2], {"ours": [rounds, rounds]}, marks={"formula": 2})
        figure = plots.lines(panel, panel)
    section = Section("The bar")
    section.picture("cost", "What it costs", figure)

    report.write("- a machine", [section], tmp_path / "page.md")

    content = (tmp_path / "page" / "cost.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert 1000 < width < 2000
    assert 150 < height < 1000
    assert len(content) < 200_000


def test_series_shows_median_and_spread() -> None:
    """The middle of the rounds, not their mean, with the lowest and the highest."""
    rounds = Series([1000.0, 10.0, 20.0])

    assert rounds.median == 20
    assert rounds.text() == "20 [10-1,000]"
    assert rounds.text(1) == "20.0 [10.0-1,000.0]"


def test_run_that_cannot_start_leaves_the_page(tmp_path: Path) -> None:
    """Without generators the run says what to install, fails, and has written nothing."""
    before = report.PAGE.read_bytes()

    done = bench(path=str(tmp_path))

    assert done.returncode == 1
    assert "wrk and h2load not found: apt-get install wrk nghttp2-client" in done.stdout
    assert "docs/benchmarks.md is as it was." in done.stdout
    assert report.PAGE.read_bytes() == before


def test_wrong_answer_leaves_the_page(tmp_path: Path) -> None:
    """A run of all parts ends at the first wrong answer: it says where, fails, and has written nothing."""
    # In wrk's place: three answers of ten were wrong.
    wrk = tmp_path / "wrk"
    wrk.write_text("#!/bin/sh\necho counted 10 1000000 3 0\n", encoding="ascii")
    wrk.chmod(0o755)
    (tmp_path / "h2load").symlink_to("/bin/true")
    written = [report.PAGE, *sorted(report.PAGE.with_suffix("").iterdir())]
    before = {file: file.read_bytes() for file in written}

    done = bench(path=f"{tmp_path}:{os.environ['PATH']}")

    said = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "bar failed at “/patients/7 · floor · warm-up”: 3 of 10 requests" in said
    assert "docs/benchmarks.md is as it was." in said
    assert {file: file.read_bytes() for file in written} == before


def test_unknown_part_is_named(tmp_path: Path) -> None:
    """A part that does not exist is answered with those that do."""
    done = bench("--only", "speed", path=str(tmp_path))

    assert done.returncode == 2
    assert (
        "speed is none of bar, total, ways, pool-size, overload, at-once, start, scrape, memory, growth." in done.stderr
    )
