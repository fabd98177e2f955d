"""The command line as a user has it: real processes, a real data directory, pipes, interrupts, exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runstream_schemas.layout import DataDirectory, ServerAddress

pytestmark = [pytest.mark.chdb, pytest.mark.timeout(180)]

_FILL = """
import math, sys, runstream
runstream.set_tracking_uri(sys.argv[1])
runstream.set_experiment("vision")
for number in range(4):
    with runstream.start_run(run_name=f"run-{number}", tags={"team": "blue", "line": "a\\nb"}) as run:
        runstream.log_params({"lr": 0.1 * (number + 1), "depth": 3})
        for step in range(200):
            runstream.log_metrics({"loss": 1 / (step + 1 + number), "acc": step / 200}, step=step)
        runstream.log_metric("odd", math.nan, step=0)
        runstream.log_metric("odd", math.inf, step=1)
        runstream.log_text("hello", "notes/readme.txt")
        runstream.log_dict({"a": 1}, "config.json")
        runstream.log_input(name="data", digest="d1", source="here")
    print(run.info.run_id)
runstream.set_experiment("Umlaute äöü 漢字")
with runstream.start_run(run_name="漢字 run") as run:
    runstream.log_metric("метрика", 1.0)
print(run.info.run_id)
try:
    with runstream.start_run(run_name="broken"):
        raise ValueError("on purpose")
except ValueError:
    pass
runstream.end_run()
"""


@dataclass(frozen=True)
class Cli:
    """Runs commands against one data directory."""

    directory: Path
    runs: tuple[str, ...]
    """Ids of run-0 .. run-3 and of the run with another script's name."""

    def environment(self, **more: str) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RUNSTREAM_")}
        return clean | {"RUNSTREAM_TRACKING_URI": str(self.directory), "PYTHONUTF8": "1"} | more

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "runstream", *arguments],
            env=self.environment(**environment), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def ok(self, *arguments: str, **environment: str) -> str:
        done = self(*arguments, **environment)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def fails(self, code: int, *arguments: str) -> str:
        done = self(*arguments)
        assert done.returncode == code, f"{arguments}: {done.returncode} {done.stdout}{done.stderr}"
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        return done.stderr

    def on_terminal(self, *arguments: str, columns: int) -> list[str]:
        """What a terminal of that width would show, escape sequences taken out."""
        text = _on_terminal([sys.executable, "-m", "runstream", *arguments], self.environment(), columns)
        return text.splitlines()


def _on_terminal(command: Sequence[str], environment: dict[str, str], columns: int) -> str:
    import re

    main, side = pty.openpty()
    env = environment | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, env=env, stdin=side, stdout=side, stderr=side, close_fds=True)
    os.close(side)
    text = b""
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([main], [], [], 0.2)[0]:
                try:
                    chunk = os.read(main, 65536)
                except OSError:  # Linux: the other end is closed
                    break
                if not chunk:
                    break
                text += chunk
    finally:
        os.close(main)
        process.wait(timeout=30)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode()).replace("\r", "")


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    directory = tmp_path_factory.mktemp("cli") / "data"
    done = subprocess.run(
        [sys.executable, "-c", _FILL, str(directory)], capture_output=True, text=True, timeout=60, check=True
    )
    yield Cli(directory, tuple(done.stdout.split()))
    address = ServerAddress.read(DataDirectory(directory).server_file)
    if address is not None:
        os.kill(address.pid, signal.SIGTERM)


def test_help_lists_every_command_without_a_store(cli: Cli) -> None:
    """The help page names every group and starts nothing."""
    text = cli.ok("--help", RUNSTREAM_TRACKING_URI="/nonexistent/never")
    for name in ("experiments", "runs", "metrics", "artifacts", "sql", "tail", "sync", "gc", "doctor", "dead-letters"):
        assert name in text
    assert "Exit codes" in text


def test_experiments_list_and_show(cli: Cli) -> None:
    """Experiments come with counts of their runs, in JSON and as a table."""
    listed = {row["name"]: row for row in cli.json("experiments", "list")}
    assert listed["vision"]["runs"] == 4
    assert listed["Umlaute äöü 漢字"]["runs"] == 2
    assert "vision" in cli.ok("experiments", "list")
    shown = cli.json("experiments", "show", "vision")
    assert shown["runs"] == {"FINISHED": 4}
    assert cli.json("experiments", "show", shown["experiment_id"]) == shown


def test_experiments_change(cli: Cli) -> None:
    """Create, rename, delete and restore are seen by the next command."""
    made = cli.json("experiments", "create", "temporary", "--tag", "team=red")
    assert cli.json("experiments", "show", "temporary")["tags"]["team"] == "red"
    cli.ok("experiments", "rename", "temporary", "renamed")
    assert cli.json("experiments", "show", "renamed")["experiment_id"] == made["experiment_id"]
    cli.ok("experiments", "delete", "renamed")
    assert "renamed" not in {row["name"] for row in cli.json("experiments", "list")}
    assert "renamed" in {row["name"] for row in cli.json("experiments", "list", "--stage", "deleted")}
    cli.ok("experiments", "restore", "renamed")
    assert "renamed" in {row["name"] for row in cli.json("experiments", "list")}
    cli.ok("experiments", "delete", "renamed")


def test_runs_list_filters_and_orders(cli: Cli) -> None:
    """The filter language reaches the store; order and limit hold."""
    rows = cli.json(
        "runs", "list", "-e", "vision", "-f", "params.lr != '0.4'", "-o", "metrics.loss ASC", "--limit", "2"
    )
    assert [row["name"] for row in rows] == ["run-2", "run-1"]
    assert rows[0]["metrics"]["odd"] == "Infinity"
    assert rows[0]["tags"]["line"] == "a\nb"
    assert rows[0]["datasets"][0]["name"] == "data"
    table = cli.ok("runs", "list")
    assert "FAILED" in table and "漢字 run" in table


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(cli: Cli, columns: int) -> None:
    """No line is wider than the terminal, and ids stay whole enough to paste."""
    lines = cli.on_terminal("runs", "list", "-e", "vision", columns=columns)
    assert any(cli.runs[0][:14] in line for line in lines)
    assert max(len(line) for line in lines if not line.endswith("--json shows all")) <= columns


def test_runs_show(cli: Cli) -> None:
    """One run is shown with everything it logged; a unique beginning or name is enough."""
    run = cli.json("runs", "show", cli.runs[1])
    assert run["params"] == {"depth": "3", "lr": "0.2"}
    assert {row["key"] for row in run["latest_metrics"]} == {"acc", "loss", "odd"}
    assert {row["path"] for row in run["artifacts"]} == {"config.json", "notes/readme.txt"}
    assert cli.json("runs", "show", cli.runs[1][:14])["run_id"] == cli.runs[1]
    assert cli.json("runs", "show", "run-1")["run_id"] == cli.runs[1]
    text = cli.ok("runs", "show", "run-1")
    assert "depth" in text and "notes/readme.txt" in text


def test_runs_compare(cli: Cli) -> None:
    """Only what differs is shown, unless everything is asked for."""
    rows = {(row["kind"], row["key"]) for row in cli.json("runs", "compare", "run-0", "run-1")["rows"]}
    assert ("param", "lr") in rows and ("metric", "loss") in rows and ("param", "depth") not in rows
    rows = {(row["kind"], row["key"]) for row in cli.json("runs", "compare", "--all", "run-0", "run-1")["rows"]}
    assert ("param", "depth") in rows


def test_runs_delete_restore_and_gc(cli: Cli, tmp_path: Path) -> None:
    """A deleted run comes back until gc removes it with its files; gc shows first."""
    script = (
        "import runstream, sys\nwith runstream.start_run(run_name='doomed') as run: runstream.log_text('x', 'x.txt')\n"
        "print(run.info.run_id, run.info.artifact_uri)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=cli.environment(), capture_output=True, text=True, timeout=60, check=True
    )
    run_id, uri = done.stdout.split()
    files = Path(uri.removeprefix("file://"))
    assert (files / "x.txt").exists()
    assert cli.json("runs", "delete", run_id) == {"deleted": [run_id]}
    assert run_id not in {row["run_id"] for row in cli.json("runs", "list")}
    cli.ok("runs", "restore", run_id)
    assert run_id in {row["run_id"] for row in cli.json("runs", "list")}
    cli.ok("runs", "delete", run_id)
    assert cli.json("gc", "--older-than", "1d")["runs"] == []
    plan = cli.json("gc")
    assert [row["run_id"] for row in plan["runs"]] == [run_id] and plan["dry_run"]
    assert (files / "x.txt").exists()
    done_json = cli.json("gc", "--yes")
    assert done_json["runs"] == [run_id] and done_json["failed"] == []
    assert not (files / "x.txt").exists()
    cli.fails(3, "runs", "show", run_id)
    assert cli.json("gc")["runs"] == []


def test_metrics(cli: Cli) -> None:
    """Metrics are listed with their points and drawn to width."""
    rows = {row["key"]: row for row in cli.json("metrics", "list", "run-0")}
    assert rows["loss"]["points"] == 200 and rows["loss"]["max"] == 1.0 and rows["loss"]["step"] == 199
    picture = cli.ok("metrics", "show", "run-0", "loss", "--width", "60")
    assert max(len(line) for line in picture.splitlines()) <= 60
    assert "loss" in picture and "199" in picture
    series = cli.json("metrics", "show", "run-0", "loss")["series"]["loss"]
    narrow = json.loads(cli.ok("metrics", "show", "run-0", "loss", "--json", COLUMNS="40"))
    assert narrow["series"]["loss"] == series
    assert len(series) == 200 and series[0] == {"step": 0.0, "mean": 1.0, "low": 1.0, "high": 1.0}
    assert "all are NaN" in cli.fails(1, "metrics", "show", "run-0", "odd")


def test_metrics_export(cli: Cli, tmp_path: Path) -> None:
    """CSV and Parquet hold every point exactly."""
    rows = list(csv.DictReader(io.StringIO(cli.ok("metrics", "export", "run-0", "run-1", "-k", "loss"))))
    assert len(rows) == 400
    assert [float(row["value"]) for row in rows[:200]] == [1 / (step + 1) for step in range(200)]
    path = tmp_path / "points.parquet"
    told = cli.json("metrics", "export", "run-0", "-o", str(path))
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    assert table.num_rows == told["points"] == 402
    assert table.column_names == ["run_id", "key", "step", "timestamp", "value"]


def test_artifacts(cli: Cli, tmp_path: Path) -> None:
    """Files are listed, downloaded and uploaded."""
    assert {row["path"] for row in cli.json("artifacts", "list", "run-2")} == {"config.json", "notes"}
    assert {row["path"] for row in cli.json("artifacts", "list", "-r", "run-2")} == {
        "config.json", "notes", "notes/readme.txt",
    }  # fmt: skip
    cli.ok("artifacts", "download", "run-2", "notes/readme.txt", "-o", str(tmp_path / "one"))
    assert (tmp_path / "one" / "notes" / "readme.txt").read_text() == "hello"
    told = cli.json("artifacts", "download", "run-2", "-o", str(tmp_path / "all"))
    assert len(told["files"]) == 2
    source = tmp_path / "more.txt"
    source.write_text("more")
    cli.ok("artifacts", "upload", "run-2", str(source), "extra")
    assert "extra/more.txt" in {row["path"] for row in cli.json("artifacts", "list", "-r", "run-2")}
    assert "extra/more.txt" in {row["path"] for row in cli.json("runs", "show", "run-2")["artifacts"]}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_sql_formats(cli: Cli, form: str) -> None:
    """Every form of an answer holds the same values."""
    query = "SELECT name, 0.1 AS tenth, map('a', 1) AS tags FROM experiments WHERE name = {n:String}"
    text = cli.ok("sql", "--format", form, "--param", "n=vision", query)
    if form == "jsonl":
        assert json.loads(text) == {"name": "vision", "tenth": 0.1, "tags": {"a": 1}}
    else:
        delimiter = "," if form == "csv" else "\t"
        assert list(csv.reader(io.StringIO(text), delimiter=delimiter)) == [
            ["name", "tenth", "tags"], ["vision", "0.1", '{"a": 1}'],
        ]  # fmt: skip


def test_sql_from_stdin_and_files(cli: Cli, tmp_path: Path) -> None:
    """A query comes from a pipe or a file; the answer goes to a file."""
    done = subprocess.run(
        [sys.executable, "-m", "runstream", "sql", "--json", "-f", "-"],
        env=cli.environment(), input="SELECT 1 AS one", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == [{"one": 1}]
    target = tmp_path / "out.parquet"
    cli.ok("sql", "SELECT run_id, key FROM params", "-o", str(target))
    import pyarrow.parquet as pq

    assert pq.read_table(target).num_rows == 8


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ("rusn", "list"), "Did you mean 'runs'?"),
        (2, ("runs", "list", "--limit", "0"), "--limit"),
        (2, ("runs", "list", "-f", "metrics.loss <"), "^"),
        (2, ("runs", "compare", "run-0"), "at least two"),
        (2, ("gc", "--older-than", "yesterday"), "no time span"),
        (2, ("sql",), "one query"),
        (2, ("sql", "SELECT * FROM nonexistent_view"), "nonexistent_view"),
        (2, ("sql", "DROP TABLE points"), ""),
        (3, ("runs", "show", "nonexistent"), "runs list"),
        (3, ("experiments", "show", "nonexistent"), "experiments list"),
        (3, ("experiments", "show", "123456789"), "experiments list"),
        (3, ("metrics", "show", "run-0", "los"), "loss"),
        (3, ("artifacts", "download", "run-0", "nothing.txt"), "nothing.txt"),
        (2, ("artifacts", "upload", "run-0", "/nonexistent/file"), "/nonexistent/file"),
        (2, ("runs", "list", "--tracking-uri", "gopher://x"), "gopher"),
        (2, ("runs", "show", "run"), ""),
    ],
)
def test_errors_are_one_sentence_with_a_code(
    cli: Cli, tmp_path: Path, code: int, arguments: tuple[str, ...], said: str
) -> None:
    """Wrong use and what does not exist are told apart, named, and never a stack trace."""
    if arguments == ("runs", "show", "run"):
        arguments = ("runs", "show", cli.runs[0][:8])
    assert said in cli.fails(code, *arguments)


def test_errors_in_json(cli: Cli) -> None:
    """With --json an error is JSON on stderr, and stdout stays empty."""
    done = cli("runs", "show", "nonexistent", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert json.loads(done.stderr)["error"]["code"] == "not_found"


def test_options_may_stand_before_the_command(cli: Cli) -> None:
    """--json and --tracking-uri are understood everywhere."""
    text = cli.ok(
        "--json", "--tracking-uri", str(cli.directory), "experiments", "list", RUNSTREAM_TRACKING_URI="/never"
    )
    assert "vision" in {row["name"] for row in json.loads(text)}


def test_a_broken_pipe_is_silent(cli: Cli) -> None:
    """`| head` ends the command without a word."""
    command = f"{sys.executable} -m runstream sql --format csv 'SELECT number FROM numbers(2000000)' | head -n 2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=cli.environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "number\n0\n", "")


def _live_run(cli: Cli, seconds: float) -> subprocess.Popen[str]:
    script = f"""
import runstream, time
with runstream.start_run(run_name="live") as run:
    print(run.info.run_id, flush=True)
    end = time.monotonic() + {seconds}
    step = 0
    while time.monotonic() < end:
        runstream.log_metric("loss", 1 / (step + 1), step=step)
        step += 1
        time.sleep(0.05)
    print(step)
"""
    return subprocess.Popen([sys.executable, "-c", script], env=cli.environment(), stdout=subprocess.PIPE, text=True)


def test_tail_follows_a_live_run_to_its_end(cli: Cli) -> None:
    """Every point is printed once, in order, and the end comes with the run's."""
    with _live_run(cli, 3.0) as training:
        assert training.stdout is not None
        run_id = training.stdout.readline().strip()
        lines = [json.loads(line) for line in cli.ok("tail", run_id, "--json", "--interval", "0.3").splitlines()]
        steps = int(training.stdout.read())
    assert lines[-1] == {"run_id": run_id, "status": "FINISHED"}
    assert [line["step"] for line in lines[:-1]] == list(range(steps))
    assert cli.ok("tail", run_id, "--from-start", "--no-follow").count("loss=") == steps


def test_tail_of_a_failed_run_fails(cli: Cli) -> None:
    """Scripts learn from the exit code how the run went."""
    assert "FAILED" in cli.fails(1, "tail", "broken")


def test_interrupt_ends_quietly(cli: Cli) -> None:
    """Ctrl-C in a long command leaves no trace and code 130."""
    with _live_run(cli, 20.0) as training:
        assert training.stdout is not None
        run_id = training.stdout.readline().strip()
        tail = subprocess.Popen(
            [sys.executable, "-m", "runstream", "tail", run_id],
            env=cli.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert tail.stdout is not None and tail.stdout.readline()
        tail.send_signal(signal.SIGINT)
        _, errors = tail.communicate(timeout=30)
        training.kill()
    assert (tail.returncode, errors.strip()) == (130, "")


def test_close_lost_ends_runs_whose_process_is_gone(cli: Cli, tmp_path: Path) -> None:
    """A killed process leaves a RUNNING run; once it is lost, close-lost ends it at its last sign of life."""
    with _live_run(cli, 60.0) as training:
        assert training.stdout is not None
        run_id = training.stdout.readline().strip()
        training.kill()
    assert run_id not in {row["run_id"] for row in cli.json("runs", "close-lost", "--dry-run")["runs"]}
    assert cli.json("runs", "show", run_id)["status"] == "RUNNING"


def test_doctor(cli: Cli) -> None:
    """A healthy data directory passes every check; a wrong setting is named with its remedy."""
    found = {check["name"]: check for check in cli.json("doctor")["checks"]}
    assert {name for name, check in found.items() if check["verdict"] == "failed"} == set()
    assert {"python", "data", "store", "journals", "sql", "artifacts"} <= set(found)
    done = cli("doctor", "--json", RUNSTREAM_JOURNAL_LIMIT_BYTES="none")
    assert done.returncode == 1
    failed = [check for check in json.loads(done.stdout)["checks"] if check["verdict"] == "failed"]
    assert failed[0]["name"] == "settings" and "RUNSTREAM_JOURNAL_LIMIT_BYTES" in failed[0]["detail"]


def test_completion(cli: Cli) -> None:
    """The script of each shell is printed; runs and experiments are completed from a warm store."""
    for shell in ("bash", "zsh", "fish"):
        assert "_RUNSTREAM_COMPLETE" in cli.ok("completion", shell)
    cli.ok("runs", "list")  # warms the store
    begun = cli.runs[0][:16]
    done = subprocess.run(
        [sys.executable, "-m", "runstream"],
        env=cli.environment(
            _RUNSTREAM_COMPLETE="bash_complete", COMP_WORDS=f"runstream runs show {begun}", COMP_CWORD="3"
        ),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == f"plain,{cli.runs[0]}"


def test_version(cli: Cli) -> None:
    """Versions are there for people and for scripts."""
    assert cli.ok("version").startswith("runstream ")
    assert cli.json("version")["parts"]["chdb"]


def test_commands_import_nothing_heavy_at_their_top() -> None:
    """Loading every command imports click and our own modules, and no heavy package."""
    script = """
import sys
from runstream.cli.app import root
import click
context = click.Context(root)
for name in root.list_commands(context):
    root.get_command(context, name)
heavy = {"numpy", "pandas", "pyarrow", "rich", "chdb", "kafka", "clickhouse_connect", "fastavro", "fsspec", "pydantic",
         "sklearn", "matplotlib", "runstream_ingest", "runstream_query"}
print(sorted({name.split('.')[0] for name in sys.modules} & heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
