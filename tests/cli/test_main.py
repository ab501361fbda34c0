"""The command `nnunet_cfcl`: verbs, exit status, output streams, and light imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nnunet_cfcl
from nnunet_cfcl import cli
from nnunet_cfcl.errors import UserError

#: Verbs whose help imports neither PyTorch nor nnU-Net.
WITH_LIGHT_HELP = (
    "install", "doctor", "settings", "export-stock", "pool", "silver", "evaluate", "probe", "report", "demo", "phantom")


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


def test_help_lists_every_verb(capsys):
    assert exit_status("--help") == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {verb}\s", shown, re.MULTILINE) for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_its_own_help_and_a_function_to_run(verb, capsys):
    assert exit_status(verb, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: nnunet_cfcl {verb}")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_list_of_verbs_repeats_the_help_of_every_parser(verb):
    def lines(parser):
        return {action.dest: action.help for action in parser._subparsers._group_actions[0]._choices_actions}

    assert lines(cli.build_parser(verb)) == {verb: lines(cli.build_parser())[verb]}


def test_version_is_that_of_the_package(capsys):
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"nnunet_cfcl {nnunet_cfcl.__version__}\n"


def test_python_dash_m_trainers_path_prints_only_the_folder():
    shown = subprocess.run([sys.executable, "-m", "nnunet_cfcl", "trainers-path"], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.count("\n") == 1
    assert (Path(shown.stdout.strip()) / "nnunet_cfcl_trainers.py").is_file()


def test_light_verbs_and_help_import_neither_torch_nor_nnunet():
    light = [["--help"], ["--version"], ["trainers-path"], *([verb, "--help"] for verb in WITH_LIGHT_HELP)]
    script = ("import sys, nnunet_cfcl.cli\n"
              f"for arguments in {light!r}:\n"
              "    try:\n        nnunet_cfcl.cli.main(arguments)\n    except SystemExit:\n        pass\n"
              "    heavy = {'torch', 'nnunetv2', 'matplotlib', 'scipy', 'umap'} & set(sys.modules)\n"
              "    assert not heavy, (arguments, heavy)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["trainer-path"], ["export-stock"]])
def test_wrong_usage_exits_with_two(arguments, capsys):
    assert exit_status(*arguments) == 2
    assert "usage: nnunet_cfcl" in capsys.readouterr().err


@pytest.mark.parametrize(("raised", "status"), [(UserError("no such file", "write it"), 1), (KeyboardInterrupt(), 130)])
def test_user_errors_are_one_line_without_a_traceback(raised, status, monkeypatch, capsys):
    def fail():
        raise raised

    monkeypatch.setattr("nnunet_cfcl.cli.installation.trainers_path", fail)
    assert cli.main(["trainers-path"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"nnunet_cfcl trainers-path: {str(raised) or 'interrupted'}\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr("nnunet_cfcl.cli.installation.trainers_path", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["trainers-path"])
