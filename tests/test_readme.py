"""Every block of the README is executed, and does what the README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import TABLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TEST_COMMAND = next(text.removeprefix("$ ").strip() for _, text in BLOCKS if "pytest" in text)
MARKER = "==== next command ===="


def blocks(language: str) -> list[str]:
    """The texts of all blocks in that language."""
    return [text for name, text in BLOCKS if name == language]


def test_there_are_no_blocks_that_nothing_executes() -> None:
    """Each block is in a language that a test below runs, and each of those tests finds its block."""
    assert {name for name, _ in BLOCKS} == {"console", "python"}
    assert (len(blocks("console")), len(blocks("python"))) == (7, 3)


def run_console(text: str, folder: Path, *, installed: bool = True) -> None:
    """Run the commands of a transcript in one shell; what they print must be what it shows, but for numbers.

    :param installed: whether the shell finds the package that is under test; else it is that of a fresh machine.
    """
    commands, shown = [], []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append(line[2:])
            shown.append("")
        else:
            shown[-1] += line + "\n"
    script = f"\necho '{MARKER}'\n".join(commands)
    here = str(Path(sys.executable).parent)
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != here]
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=True,
        env={
            **os.environ,
            "PATH": os.pathsep.join([here, *path] if installed else path),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
    )
    printed = done.stdout.split(f"{MARKER}\n")
    assert [_without_numbers(part) for part in printed] == [_without_numbers(part) for part in shown]


def _without_numbers(text: str) -> str:
    lines = [line for line in text.splitlines() if "Killed" not in line and not line.startswith("WARNING: Location")]
    return "\n".join(re.sub(r" +", " ", re.sub(r"\d[\d.,:]*", "N", line)).strip() for line in lines)


def test_the_first_command_installs_and_runs_the_sample(tmp_path: Path) -> None:
    """On a fresh clone, with nothing but Python and pip, the first command gives the sample's output."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "__pycache__", "processed_output*"))
    run_console(blocks("console")[0], clone, installed=False)
    records = json.loads((clone / "data" / "processed_output.json").read_text())
    assert [record["index"] for record in records] == list(range(12))
    assert records[0]["word_count"] == 9


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    """It can not run within itself; CI runs the very same line on each change."""
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text().splitlines()


def printed_by(example: str, folder: Path) -> str:
    """What an example prints on standard output; on standard error it prints nothing, not even a warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_the_embedding_example_runs(tmp_path: Path) -> None:
    """As it stands, in a folder with a file of URLs."""
    (tmp_path / "urls.txt").write_text("".join(f"https://example.org/{n}\n" for n in range(300)))
    assert printed_by(blocks("python")[0], tmp_path) == "300 pages, 300 calls of fetch in this run\n"
    first = json.loads((tmp_path / "pages.jsonl").read_text().splitlines()[0])
    assert first == {"index": 0, "url": "https://example.org/0", "length": 21}


def test_the_transcript_of_kill_and_resume_is_true(tmp_path: Path) -> None:
    """The job is killed and resumed as shown, and its output is that of a run that nobody killed."""
    (tmp_path / "jobs.py").write_text(blocks("python")[1])
    for number in (2, 3, 6):  # and what `verify` then says
        run_console(blocks("console")[number], tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert names == {"jobs.py", "numbers.txt", "squares.jsonl", "summary.json", "undisturbed.jsonl"}


def test_the_transcript_of_failures_is_true(tmp_path: Path) -> None:
    """Whatever the dice give, one item is recorded as failed: others fail one time in ten, and have nine attempts."""
    (tmp_path / "shop.py").write_text(blocks("python")[2])
    run_console(blocks("console")[4], tmp_path)
    assert len((tmp_path / "paid.jsonl").read_text().splitlines()) == 300


def test_the_version_is_shown(tmp_path: Path) -> None:
    """The last transcript."""
    run_console(blocks("console")[5], tmp_path)


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Files that the README links to are there."""
    assert f"({name})" in README
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_name_tables_that_are_measured(page: str) -> None:
    """Every command that gives a figure is one; and the page of figures has each table, with its plot."""
    text = (ROOT / page).read_text()
    tables = set(re.findall(r"python -m tests\.benchmarks (\w+)", text))
    assert tables
    assert tables <= set(TABLES)
    modules = set(re.findall(r"python -m tests\.benchmarks\.(\w+)", text))
    assert all((ROOT / "tests" / "benchmarks" / f"{module}.py").is_file() for module in modules)
    plots = set(re.findall(r"\(plots/(\w+)\.svg\)", text))
    assert page == "README.md" or plots == set(TABLES)
    assert all((ROOT / "docs" / "plots" / f"{plot}.svg").is_file() for plot in plots)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_name_tests_and_files_that_are_there(page: Path) -> None:
    """Every test, link and path of a command that a page names exists; the commands themselves run in CI."""
    text = page.read_text()
    names = set(re.findall(r"`(test_\w+\.py)`", text))
    assert names <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all((page.parent / link).exists() for link in links)
    commands = re.findall(r"^\$ \.venv/bin/python -m pytest (\S+)", text, re.MULTILINE)
    assert all((ROOT / path).exists() for path in commands)
    assert page.name != "proof.md" or (names and commands)


def test_the_examples_of_the_page_about_failures_run(tmp_path: Path) -> None:
    """As they stand, with what they print."""
    examples = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "failures.md").read_text(), re.MULTILINE | re.DOTALL
    )
    printed = [printed_by(example, tmp_path) for example in examples]
    assert printed == ["0 finished, 0 failed, 0 retries\n500\n", f"{sum(n * n for n in range(1000))}\n"]
