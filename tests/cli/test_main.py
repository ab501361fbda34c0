"""The command `nnunet_cfcl`: verbs, exit status, what goes to which stream, and speed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nnunet_cfcl
from nnunet_cfcl import cli
from nnunet_cfcl.errors import UserError


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "nnunet_cfcl", *arguments], capture_output=True, text=True)


def test_help_names_every_verb():
    shown = run("--help")
    assert shown.returncode == 0
    assert all(re.search(rf"^    {verb}\s", shown.stdout, re.MULTILINE) for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_own_help_and_a_function_to_run(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: nnunet_cfcl {verb}")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_list_of_verbs_says_what_the_verbs_own_room_says(verb):
    def lines(parser):
        return {action.dest: action.help for action in parser._subparsers._group_actions[0]._choices_actions}

    assert lines(cli.build_parser(verb)) == {verb: lines(cli.build_parser())[verb]}


def test_version_is_the_packages_version():
    assert run("--version").stdout == f"nnunet_cfcl {nnunet_cfcl.__version__}\n"


def test_trainers_path_prints_the_folder_and_nothing_else():
    shown = run("trainers-path")
    assert shown.stderr == ""
    assert shown.stdout.count("\n") == 1
    assert (Path(shown.stdout.strip()) / "nnunet_cfcl_trainers.py").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trainers-path"], ["doctor", "--help"]])
def test_light_verbs_import_neither_torch_nor_nnunet(arguments):
    script = ("import sys, nnunet_cfcl.cli\n"
              f"try:\n    nnunet_cfcl.cli.main({arguments!r})\nexcept SystemExit:\n    pass\n"
              "heavy = {'torch', 'nnunetv2', 'matplotlib', 'scipy', 'umap'} & set(sys.modules)\n"
              "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["trainer-path"], ["export-stock"]])
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: nnunet_cfcl" in capsys.readouterr().err


@pytest.mark.parametrize(("raised", "status"), [(UserError("no such thing; make it"), 1), (KeyboardInterrupt(), 130)])
def test_errors_for_users_are_one_line_without_a_traceback(raised, status, monkeypatch, capsys):
    def fail():
        raise raised

    monkeypatch.setattr("nnunet_cfcl.cli.installation.trainers_path", fail)
    assert cli.main(["trainers-path"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"nnunet_cfcl trainers-path: {str(raised) or 'interrupted'}\n"


def test_an_error_in_the_program_itself_keeps_its_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr("nnunet_cfcl.cli.installation.trainers_path", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["trainers-path"])
