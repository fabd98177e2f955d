"""The README is true: its Python runs as written, its commands exist, its settings are all there are."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from runstream.cli.app import root
from runstream.config import ENVIRONMENT_VARIABLES
from runstream_ingest.config import IngestSettings
from runstream_ingest.log.kafka_topics import TopicSettings
from runstream_query.server.settings import ServerSettings
from runstream_schemas.kafka_address import ENVIRONMENT_VARIABLES as KAFKA_VARIABLES

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text("utf-8")


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _environment(folder: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RUNSTREAM_")}
    return clean | {"PYTHONWARNINGS": "error", "COLUMNS": "100"}


@pytest.mark.chdb
def test_python_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    """The ten lines log a run and read it back, in an empty folder."""
    (snippet,) = _blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path, env=_environment(tmp_path), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FINISHED" in done.stdout and "0.001" in done.stdout
    assert re.search(r"loss\s+1000\s+0\.001", done.stdout)
    for command in _blocks("sh"):
        for line in command.splitlines():
            done = subprocess.run(
                line.replace("runstream ", f"{shlex.quote(sys.executable)} -m runstream ", 1),
                cwd=tmp_path, env=_environment(tmp_path), capture_output=True, text=True, timeout=60, shell=True,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}: {done.stderr}"
            assert done.stdout or "> runs.csv" in line, line


@pytest.mark.chdb
def test_sql_of_the_readme_is_answered(tmp_path: Path) -> None:
    """Every SQL statement of the README runs against the public views."""
    statements = _blocks("sql")
    assert statements
    for statement in statements:
        done = subprocess.run(
            [sys.executable, "-m", "runstream", "sql", "--json", "--", statement],
            cwd=tmp_path, env=_environment(tmp_path), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{statement}: {done.stderr}"
        assert done.stdout.strip() == "[]"


def _named_commands(text: str) -> set[tuple[str, ...]]:
    """Every `runstream group [command]` that a page names, in code."""
    named: set[tuple[str, ...]] = set()
    lines = re.findall(r"`([^`\n]+)`|^ {4}(.+)$", text, re.MULTILINE)
    for code in [span or line for span, line in lines] + [
        line for block in _blocks("sh", text) for line in block.split("\n")
    ]:
        words = code.split("#")[0].split()
        if len(words) > 1 and words[0] == "runstream" and re.fullmatch(r"[a-z][a-z-]*", words[1]):
            second = words[2] if len(words) > 2 and re.fullmatch(r"[a-z][a-z-]*", words[2]) else ""
            named.add((words[1], second) if second else (words[1],))
    return named


def test_every_command_that_the_readme_names_exists() -> None:
    """A command that is renamed is renamed in the documentation, too."""
    named = _named_commands(README)
    assert len(named) > 10
    context = click.Context(root)
    for words in named:
        command = root.get_command(context, words[0])
        assert command is not None, words
        if len(words) > 1 and isinstance(command, click.Group):
            assert command.get_command(context, words[1]) is not None, words


def test_every_command_is_documented() -> None:
    """Every command and group of the program stands in the README and, with its subcommands, in deploy/cli.md."""
    reference = (REPOSITORY / "deploy" / "cli.md").read_text("utf-8")
    context = click.Context(root)
    for name in root.list_commands(context):
        assert re.search(rf"\b{name}\b", README), name
        command = root.get_command(context, name)
        children = command.list_commands(context) if isinstance(command, click.Group) else [""]
        for child in children:
            full = f"{name} {child}".strip()
            assert re.search(rf"`{full}[`\s]", reference), full


def test_every_setting_is_documented() -> None:
    """Every environment variable of client, worker and Kafka stands in the README's table."""
    table = README.split("<!-- settings: begin -->")[1].split("<!-- settings: end -->")[0]
    worker = {f"RUNSTREAM_{name.upper()}" for name in IngestSettings.model_fields}
    topics = {f"RUNSTREAM_KAFKA_TOPIC_{field.name.upper()}" for field in fields(TopicSettings)}
    server = {f"RUNSTREAM_SERVER_{name.upper()}" for name in ServerSettings.model_fields}
    known = (
        set(ENVIRONMENT_VARIABLES) | set(KAFKA_VARIABLES) | worker | topics | server - {"RUNSTREAM_SERVER_TRACKING_URI"}
    )
    documented = set(re.findall(r"^\| `(RUNSTREAM_[A-Z_]+)`", table, re.MULTILINE))
    assert known - documented == set()


def test_every_variable_that_the_code_reads_is_documented() -> None:
    """No module reads a RUNSTREAM_ variable that the README does not explain."""
    read: set[str] = set()
    for package in (
        "client/runstream",
        "ingest/runstream_ingest",
        "query/runstream_query",
        "schemas/runstream_schemas",
    ):
        for file in (REPOSITORY / package).rglob("*.py"):
            read |= set(re.findall(r"""environ(?:\.get\(|\[)\s*["'](RUNSTREAM_[A-Z_]+)["']""", file.read_text("utf-8")))
    assert {name for name in read if name not in README} == set()


def test_links_of_the_readme_lead_somewhere() -> None:
    """Relative links name files of the repository."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_folders_of_the_map_exist() -> None:
    """The map of the code names folders and files that are there."""
    section = README.split("## Map of the code")[1]
    for row in re.findall(r"^\| (`.+?)\| ", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            assert (REPOSITORY / name).exists(), name


def test_every_benchmark_is_listed() -> None:
    """bench/README.md names every benchmark, and the README's figures come from benchmarks that exist."""
    listed = (REPOSITORY / "bench" / "README.md").read_text("utf-8")
    files = {f"bench/{file.name}" for file in (REPOSITORY / "bench").glob("*.py")}
    assert {name for name in files if f"`{name}`" not in listed} == set()
    assert set(re.findall(r"`(bench/\w+\.py)", README + listed)) <= files
