"""Exit codes and error lines of commands whose work has failed."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from zsl.cli.errors import one_line_errors, say
from zsl.cli.train import train
from zsl.cli.trunkd import trunkd
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_RUN_FAILED, EXIT_STARTUP_FAILED, EXIT_USAGE, RunFailed, StartupError
from zsl.files.new_directory import new_directory
from zsl.text.printable import PrintableFormatter

# Of each command one text is held word for word; all other tests hold the path, option, name or number in it.
#   zsl               test_an_output_without_space_is_told_in_a_line, here
#   zsl-train         test_checkpoints.py -k another_configuration_is_refused_with_the_keys
#   zsl-trunkd        test_daemon.py -k port_in_use
#   zsl split         test_split_command.py -k nothing_is_put_in_the_place
#   zsl export, merge test_merge.py -k moved_since
#   zsl info          test_info.py -k nothing_there
#   zsl keygen        test_keygen.py -k second_pair
#   zsl doctor        test_doctor.py -k packages_are_compared
#   zsl generate, chat, eval, serve
#                     test_generate_command.py -k without_a_model

LONG = "x" * 5000


def ended_with(error: Exception) -> Result:
    @click.command
    def command() -> None:
        with one_line_errors("zsl-some", debug=False):
            raise error

    return CliRunner().invoke(command)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\nno such\tthing\nand 200 lines\nmore", " no such thing"),
        (LONG, f" {LONG[:300]}…"),
        ("", ""),
    ],
    ids=["many lines", "a long line", "no text"],
)
def test_of_a_foreign_error_the_beginning_is_told_in_a_line(text: str, shown: str) -> None:
    ended = ended_with(OverflowError(text))
    assert (ended.exit_code, ended.stderr) == (1, f"zsl-some: OverflowError:{shown} (--debug shows where)\n")


def test_an_error_of_zsl_is_told_whole() -> None:
    ended = ended_with(RunFailed(f"first\nsecond {LONG}"))
    assert (ended.exit_code, ended.stderr) == (1, f"zsl-some: first second {LONG}\n")


def code_of_writing_to(output: int, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of a command that says something there."""
    with open(output, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as ended, one_line_errors("zsl-some", debug=False):
            say("something")
        assert not stream.closed and stream.write("more") and stream.flush() is None  # as at the interpreter's end
    return ended.value.code


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert code_of_writing_to(writing, monkeypatch) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_an_output_without_space_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert code_of_writing_to(os.open("/dev/full", os.O_WRONLY), monkeypatch) == EXIT_RUN_FAILED
    assert capfd.readouterr().err == "zsl-some: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "--help"]], ids=" ".join)
def test_help_ends_as_other_output_does_where_it_cannot_be_written(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ended_with(output: int) -> tuple[int | str | None, str]:
        with open(output, "w") as stream:
            monkeypatch.setattr("sys.stdout", stream)
            with pytest.raises(SystemExit) as ended:
                command.main(arguments, prog_name="zsl")
        return ended.value.code, capfd.readouterr().err

    reading, writing = os.pipe()
    os.close(reading)
    assert ended_with(writing) == (128 + signal.SIGPIPE, "")
    code, told = ended_with(os.open("/dev/full", os.O_WRONLY))
    assert code == EXIT_RUN_FAILED and told.startswith("zsl: standard output cannot be written")
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", [None, *command.commands, "train", "trunkd"])
def test_help_fits_a_terminal_of_80_columns_and_describes_every_option(name: str | None) -> None:
    shown: click.Command = {"train": train, "trunkd": trunkd, None: command}.get(name) or command.commands[str(name)]
    text = CliRunner().invoke(shown, ["--help"], terminal_width=80).output
    assert text and [line for line in text.splitlines() if len(line) > 80] == []
    options = [parameter for parameter in shown.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_doctor_refuses_an_invalid_endpoint_before_any_check() -> None:
    ended = CliRunner().invoke(command, ["doctor", "--server", "x"])
    assert (ended.exit_code, ended.stdout) == (EXIT_USAGE, "")
    assert ended.stderr.startswith("zsl doctor: endpoint 'x'")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", "/somewhere/.saving-1234")


def test_a_folder_that_cannot_be_written_is_exit_3_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(StartupError) as raised, new_directory(tmp_path / "out"):
        pass
    assert str(raised.value) == f"{tmp_path} cannot be written: Permission denied; name another --out"
    assert raised.value.exit_code == EXIT_STARTUP_FAILED
    made = CliRunner().invoke(command, ["keygen", "alice", "--out", str(tmp_path)])
    assert (made.exit_code, made.stdout) == (EXIT_STARTUP_FAILED, "")
    assert made.stderr == f"zsl keygen: {tmp_path} cannot be written: Permission denied; name another --out\n"


def test_what_fails_in_the_middle_is_told_without_the_names_of_files_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.files.new_directory.sync_tree", refuse)
    with pytest.raises(RunFailed) as raised, new_directory(tmp_path / "out"):
        pass
    assert str(raised.value) == f"{tmp_path / 'out'} could not be written: Permission denied"
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_commands_cuts_no_description() -> None:
    shown = CliRunner().invoke(command, ["--help"], terminal_width=80).output
    described = shown.partition("Commands:")[2].strip()
    assert "..." not in described and len(described.splitlines()) == len(command.commands)


@pytest.mark.parametrize(("name", "asked", "offered"), [("zsl", "do", "doctor"), ("zsl-train", "--se", "--server-key")])
def test_the_commands_complete_in_the_shell_as_the_guide_says(name: str, asked: str, offered: str) -> None:
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    assert f'eval "$({variable}=bash_source {name})"' in guide
    commands: dict[str, click.Command] = {"zsl": command, "zsl-train": train}
    words = {variable: "bash_complete", "COMP_WORDS": f"{name} {asked}", "COMP_CWORD": "1"}
    shown = CliRunner().invoke(commands[name], prog_name=name, env=words)
    assert shown.exit_code == 0 and f"plain,{offered}" in shown.output.splitlines()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["info", "--help"]])
def test_help_that_cannot_be_written_is_told_in_a_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as ended:
            command(arguments, prog_name="zsl")
    assert ended.value.code == EXIT_RUN_FAILED
    assert capfd.readouterr().err == "zsl: standard output cannot be written: No space left on device\n"


def test_where_no_error_can_be_told_the_exit_code_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        with pytest.raises(SystemExit) as ended:
            command(["info", "nowhere"], prog_name="zsl")
    assert ended.value.code == EXIT_USAGE


def test_text_of_others_in_an_error_is_escaped() -> None:
    ended = ended_with(RunFailed("a file \x1b]0;title\x07 and\u2028another \u202e\x9b line"))
    assert ended.stderr == "zsl-some: a file \\x1b]0;title\\x07 and another \\u202e\\x9b line\n"


def test_a_logged_message_is_one_line_and_its_traceback_indented() -> None:
    try:
        raise ValueError("text\n00:00:00 INFO forged\x1b[2J")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "read %s", "args": ("a\nb\x07",), "exc_info": (ValueError, error, error.__traceback__)}
        )
    first, *rest = PrintableFormatter("zsl: %(message)s").format(record).split("\n")
    assert first == "zsl: read a\\nb\\x07"
    assert all(line.startswith("  ") for line in rest) and rest[-1] == "  00:00:00 INFO forged\\x1b[2J"
