"""What is public, what it costs to import, and that both hold without the optional parts."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import runstream

HEAVY = {
    "chdb",
    "clickhouse_connect",
    "fastapi",
    "fastavro",
    "fsspec",
    "kafka",
    "matplotlib",
    "numpy",
    "pandas",
    "psutil",
    "pyarrow",
    "pydantic",
    "runstream_query",
    "yaml",
}


def test_every_public_name_exists_and_is_documented() -> None:
    """Each name of __all__ resolves, also the ones that are imported later, and has a docstring."""
    assert len(set(runstream.__all__)) == len(runstream.__all__)
    for name in runstream.__all__:
        value = getattr(runstream, name)
        if callable(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), name


def test_nothing_else_is_public() -> None:
    """What a user sees in dir() is __all__; a name that does not exist is an AttributeError."""
    assert sorted(dir(runstream)) == sorted(runstream.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        runstream.nonsense  # noqa: B018


def test_the_issue_is_covered() -> None:
    """The calls that were promised are there."""
    promised = """
        set_tracking_uri get_tracking_uri set_experiment create_experiment start_run active_run last_active_run end_run
        log_param log_params log_metric log_metrics set_tag set_tags delete_tag set_experiment_tag set_experiment_tags
        log_artifact log_artifacts log_text log_dict log_figure log_image log_table load_table log_input
        get_artifact_uri search_runs search_experiments get_run get_experiment get_experiment_by_name delete_run
        restore_run delete_experiment restore_experiment rename_experiment metric_history flush sql list_artifacts
        download_artifacts load_text load_dict get_parent_run enable_system_metrics_logging
        disable_system_metrics_logging Client
    """
    assert set(promised.split()) <= set(runstream.__all__)


@pytest.mark.parametrize("module", ["artifacts", "data", "entities", "errors", "testing", "client"])
def test_modules_say_what_is_theirs(module: str) -> None:
    """__all__ of each public module is importable."""
    loaded = importlib.import_module(f"runstream.{module}")
    for name in loaded.__all__:
        assert hasattr(loaded, name), name


def test_import_is_light() -> None:
    """Importing runstream, starting it not, loads nothing heavy and starts no thread."""
    code = (
        "import sys, threading, runstream\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))\n"
        "print(threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, threads = done.stdout.splitlines()
    assert not HEAVY & set(eval(loaded))
    assert threads == "1"


def test_logging_loads_no_reading_and_no_science() -> None:
    """A training process that logs metrics, params and text needs neither numpy nor pandas nor the store's driver."""
    code = (
        "import sys, runstream\n"
        "from runstream.testing import recording\n"
        "with recording(), runstream.start_run():\n"
        "    runstream.log_metric('x', 1.0); runstream.log_param('a', 1); runstream.flush()\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not (HEAVY - {"fastavro"}) & set(eval(done.stdout))


def test_missing_parts_name_the_line_to_install() -> None:
    """Without the reading packages, reading says what to install, and logging works."""
    code = (
        "import sys\n"
        "for name in ('clickhouse_connect', 'pandas', 's3fs'): sys.modules[name] = None\n"
        "import runstream\n"
        "from runstream.testing import recording\n"
        "with recording():\n"
        "    with runstream.start_run() as run: runstream.log_metric('x', 1.0)\n"
        "    with runstream.start_run(run_id=run.info.run_id): pass\n"
        "    with runstream.start_run(run_id='elsewhere'): pass\n"
        "    runstream.delete_run('elsewhere')\n"
        "    for call in (runstream.search_runs, lambda: runstream.get_run('x'), lambda: runstream.sql('SELECT 1')):\n"
        "        try: call()\n"
        "        except runstream.MissingExtraError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("pip install 'runstream[server]'" in line for line in lines)


def test_types_are_shipped() -> None:
    """py.typed lies in the package, and the consumer file type-checks strictly."""
    assert files("runstream").joinpath("py.typed").is_file()


def test_a_typed_consumer_checks() -> None:
    """mypy in strict mode takes a program that uses the public API, and agrees on the types it asserts."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    consumer = Path(__file__).with_name("typed_consumer.py")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(consumer)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=consumer.parents[2])
    assert done.returncode == 0, done.stdout
