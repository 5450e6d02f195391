"""The program as a whole, `config` and `doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trackagent.agent.cli import COMMANDS, main, version

LETTERS = ("list", "show", "retry", "discard")
JSON_COMMANDS = ("status", "runs", "show", "reduction", "tail", "top", "doctor", "config")


def invoke(*arguments: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner(env=environ).invoke(main, list(arguments))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return ["--dir", str(tmp_path / "dir"), "--state", str(tmp_path / "state")]


def test_the_version_is_the_distribution_s() -> None:
    assert invoke("--version").stdout == f"trackagent {version()}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_examples(name: str) -> None:
    assert f"Examples:\n    trackagent {name}" in invoke(name, "--help").stdout


@pytest.mark.parametrize("name", LETTERS)
def test_the_help_of_every_command_about_dead_letters_has_examples(name: str) -> None:
    text = invoke("dead-letters", name, "--help").stdout
    assert f"Examples:\n    trackagent dead-letters {name}" in text


@pytest.mark.parametrize("name", JSON_COMMANDS)
def test_the_help_of_every_command_with_json_states_its_keys(name: str) -> None:
    text = invoke(name, "--help").stdout
    assert "--json" in text
    assert "\n  JSON" in text


def test_the_help_fits_in_80_columns() -> None:
    every = [[], *([name] for name in COMMANDS), *(["dead-letters", name] for name in LETTERS)]
    texts = [invoke(*name, "--help").stdout for name in every]
    assert [line for text in texts for line in text.splitlines() if len(line) > 80] == []


def test_the_help_of_the_program_imports_neither_grpc_nor_numpy() -> None:
    script = (
        "import sys\n"
        "from trackagent.agent.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print({'grpc', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["runs", "--limit", "none"], "'none' is not a valid integer range"),
        (["export"], "Missing argument 'RUN'"),
        (["run"], "Missing argument 'COMMAND...'"),
        (["config", "--max-streams", "none"], "max_streams is 'none': give a whole number"),
        (["runs", "--config", "/nonexistent"], "/nonexistent: no such file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith("trackagent: ")
    assert message in result.stderr


def test_a_wrong_variable_is_wrong_use() -> None:
    result = invoke("config", environ={"TRACKAGENT_LOG_LEVEL": "loud"})
    assert (result.exit_code, result.stderr) == (
        2,
        "trackagent: log_level is 'loud': give debug, info, warning, error "
        "(from environment TRACKAGENT_LOG_LEVEL)\n",
    )


@pytest.mark.parametrize("name", ["status", "stop", "runs", "show", "tail", "doctor", "config"])
@pytest.mark.parametrize(
    ("flag", "field"), [("--dir", "directory"), ("--state", "state_directory")]
)
def test_an_empty_folder_is_wrong_use(name: str, flag: str, field: str) -> None:
    result = invoke(name, flag, "")
    expected = f"trackagent: {field} is '': give a path (from flag {flag})\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", expected)


def test_no_command_runs_beside_an_empty_folder(tmp_path: Path) -> None:
    result = invoke("run", "--dir", "", "--", "touch", str(tmp_path / "ran"))
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])


@pytest.mark.parametrize("field", ["directory", "state_directory"])
def test_an_empty_folder_in_the_file_is_wrong_use(tmp_path: Path, field: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'{field} = ""\n')
    result = invoke("config", "--config", str(file))
    expected = f"trackagent: {field} is '': give a path (from file {file})\n"
    assert (result.exit_code, result.stderr) == (2, expected)


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    empty = {"TRACKAGENT_DIR": "", "TRACKAGENT_STATE": "", "HOME": str(tmp_path)}
    shown = json.loads(invoke("config", "--json", environ=empty).stdout)
    assert {shown[name]["from"] for name in ("directory", "state_directory")} == {"default"}


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e300"])
@pytest.mark.parametrize("name", [("stop",), ("status",), ("dead-letters", "retry", "--all")])
def test_a_timeout_that_no_clock_can_wait_for_is_wrong_use(
    folders: list[str], name: tuple[str, ...], seconds: str
) -> None:
    result = invoke(*name, *folders, "--timeout", seconds)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert f"{seconds} is not a number of seconds up to 31536000" in result.stderr


# --- a standard output that takes nothing


def redirected(how: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "trackagent.agent.cli", *arguments]
    shell = ["sh", "-c", f'exec "$@" {how}', "sh", *program]
    # Buffered, as people have it: what cannot be written fails a second time at the end.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        shell, env=environ, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("name", ["stop", "config"])
def test_what_cannot_be_printed_is_an_error(folders: list[str], name: str) -> None:
    done = redirected(">&-", name, *folders)
    expected = f"trackagent: {name}: standard output is closed\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.parametrize("name", ["stop", "config", "doctor"])
def test_an_output_without_room_is_one_line(folders: list[str], name: str) -> None:
    done = redirected(">/dev/full", name, *folders)
    expected = f"trackagent: {name}: cannot print: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, expected)
    assert redirected(">/dev/full 2>&1", name, *folders).returncode == 1


@pytest.mark.parametrize("how", [">&-", ">/dev/full"])
def test_help_that_cannot_be_printed_is_one_line(how: str) -> None:
    done = redirected(how, "--help")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("trackagent: cannot print: ")


def test_a_command_runs_beside_an_agent_without_any_standard_stream(folders: list[str]) -> None:
    done = redirected("<&- >&- 2>&-", "run", *folders, "--", "sh", "-c", "exit 5")
    assert done.returncode == 5


# --- config


def test_config_shows_where_a_value_comes_from(folders: list[str]) -> None:
    shown = invoke("config", *folders, environ={"TRACKAGENT_MAX_STREAMS": "9"}).stdout
    assert ["max_streams", "9", "environment", "TRACKAGENT_MAX_STREAMS"] in [
        line.split() for line in shown.splitlines()
    ]


def test_config_as_json_has_typed_values(folders: list[str]) -> None:
    shown = json.loads(invoke("config", *folders, "--max-streams", "9", "--json").stdout)
    assert shown["max_streams"] == {"value": 9, "from": "flag --max-streams"}
    assert shown["group"] == {"value": None, "from": "default"}


# --- doctor


def test_a_healthy_node_is_exit_code_0(folders: list[str]) -> None:
    result = invoke("doctor", *folders)
    assert (result.exit_code, "FAIL" in result.stdout) == (0, False)


def test_a_node_that_cannot_work_is_exit_code_1(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    result = invoke("doctor", *folders)
    assert (result.exit_code, "FAIL" in result.stdout) == (1, True)


def test_doctor_as_json_has_the_checks(folders: list[str]) -> None:
    checks = json.loads(invoke("doctor", *folders, "--json").stdout)
    assert {frozenset(check) for check in checks} == {
        frozenset(("name", "status", "found", "advice"))
    }
