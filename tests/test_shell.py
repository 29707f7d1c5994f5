"""Shell manners: help, completion, progress, pipes, streams."""

import io
import re
import shutil
import subprocess
import sys
import time

import pytest

from fxprop import progress
from fxprop.cli import main as cli
from fxprop.cli import options as cli_options
from fxprop.cli import report as cli_report
from fxprop.progress import show_progress, stage

COMMANDS = [
    "report",
    "layers",
    "plot",
    "code",
    "explain",
    "dump",
    "bench",
    "calibrate",
    "fidelity",
    "plan",
    "completion",
]
MODEL = ["tests.test_inspect:net", "--input", "4x3x8x8"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"  fxprop {command} " in capsys.readouterr().out.partition("examples:")[2].replace(
        'eval "$(', "  "
    )


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^    (\w+)(?: +\w|$)", text, re.MULTILINE) == COMMANDS
    assert "exit codes" in text


@pytest.mark.parametrize("command", ["report resnet18", "code resnet152"])
def test_a_reader_that_leaves_is_no_error(command):
    """Of little text, and of more than a pipe holds."""
    line = f"{sys.executable} -m fxprop {command} | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.splitlines()[1] == "0"


def test_dash_is_standard_output(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("report", "layers", "code"):
        cli.main([command, "resnet18"])
        plain = capsys.readouterr().out
        cli.main([command, "resnet18", "-o", "-"])
        assert capsys.readouterr().out == plain
    assert list(tmp_path.iterdir()) == []


def test_depth_and_all(capsys):
    def lines(*options):
        assert cli.main(["report", "resnet18", *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert len(lines("--depth", "1")) < len(lines()) < len(lines("--all"))
    assert any(line.startswith("    layer1.0.conv1 ") for line in lines("--all"))
    for wrong in (["--depth", "0"], ["--depth", "1", "--all"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["report", "resnet18", *wrong])
    assert "not allowed with argument" in capsys.readouterr().err


# --- completion -------------------------------------------------------------------------------------------


def completed(script, words):
    """What bash offers for the last of `words`."""
    line = (
        f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        "$(complete -p fxprop | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
    )
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "fxprop.bash"
    assert cli.main(["completion", "bash", "-o", str(file)]) == 0
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fxprop", "re"], {"report"}),
        (["fxprop", "report", "resnet1"], {"resnet18", "resnet101", "resnet152"}),
        (["fxprop", "report", "resnet18", "--form"], {"--format"}),
        (["fxprop", "report", "resnet18", "--format", "ma"], {"markdown"}),
        (["fxprop", "completion", ""], {"bash", "zsh"}),
    ],
)
def test_bash_completes(script, words, offered):
    words = [word or "''" for word in words]
    assert offered <= set(completed(script, words))


def test_zsh_script(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef fxprop")


# --- progress ---------------------------------------------------------------------------------------------


def watched(monkeypatch, terminal=True, after=0.0):
    """Standard error to look at, with progress after a moment."""
    monkeypatch.setattr(progress, "_AFTER", after)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    written = io.StringIO()
    written.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", written)
    return written


def test_a_stage_that_lasts_is_shown_and_wiped_away(monkeypatch):
    written = watched(monkeypatch)
    with show_progress(True):
        with stage("tracing"):
            with stage("inside"):
                time.sleep(0.05)
            time.sleep(0.05)
        between = written.getvalue()
        with stage("rewriting"):
            time.sleep(0.05)
    text = written.getvalue()
    assert re.search(r"fxprop: inside 00:00.*fxprop: tracing 00:00", text, re.DOTALL)
    assert between.endswith("\r")  # the line is free for other bars
    assert "fxprop: rewriting" in text
    assert text.endswith("\r")


def test_what_is_quick_shows_nothing(monkeypatch):
    written = watched(monkeypatch, after=2.0)
    with show_progress(True), stage("tracing"):
        time.sleep(0.05)
    assert written.getvalue() == ""


def test_nothing_is_shown_unless_asked_for(monkeypatch):
    written = watched(monkeypatch)
    with show_progress(False), stage("tracing"):
        time.sleep(0.05)
    with stage("tracing"):
        time.sleep(0.05)
    assert written.getvalue() == ""


def test_a_stage_that_fails_is_wiped_away(monkeypatch):
    def fail():
        with show_progress(True), stage("tracing"):
            time.sleep(0.05)
            raise ValueError("no")

    written = watched(monkeypatch)
    with pytest.raises(ValueError, match="no"):
        fail()
    assert written.getvalue().endswith("\r")


@pytest.mark.parametrize("options", [[], ["-q"]])
@pytest.mark.parametrize("terminal", [True, False])
def test_commands_show_stages_on_a_terminal_only(monkeypatch, capsys, options, terminal):
    load = cli_options.load

    def slow(source):
        time.sleep(0.1)
        return load(source)

    monkeypatch.setattr(cli_options, "load", slow)
    written = watched(monkeypatch, terminal)
    assert cli.main(["report", *MODEL, *options]) == 0
    assert (f"building {MODEL[0]}" in written.getvalue()) == (terminal and not options)


def test_alone_it_shows_what_to_do_first(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  fxprop (\w+) ", text, re.MULTILINE)
    assert shown == ["report", "explain", "bench", "report"]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help_fits_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    # code of many options cannot be broken: an example may be longer by a word
    assert [
        line for line in capsys.readouterr().out.splitlines() if len(line) > 80 + 25 * ("  fxprop " in line)
    ] == []


def test_the_list_of_layers_fits_a_narrow_terminal_and_is_whole_in_a_pipe(capsys, monkeypatch):
    assert cli.main(["layers", *MODEL]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(cli_report.sys.stdout, "isatty", lambda: True)
    assert cli.main(["layers", *MODEL]) == 0
    narrow = capsys.readouterr().out
    assert "n element" in whole
    assert "n element" not in narrow
    assert "n channel" in narrow
    assert len(narrow.splitlines()) == len(whole.splitlines())
