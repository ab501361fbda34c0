"""The real parser of every program that the pages name."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch

from torch.distributed.run import get_args_parser

from nnunet_cfcl.cli import VERBS, build_parser, pretrain
from tests.docs.pages import ROOT

#: A word that stands for something in the pages -> one of its kind, where a parser looks at it closely.
EXAMPLES = {"SETTINGS": "{}"}


class Captured(Exception):
    """A program has come to the point at which it reads its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _capture(parser: argparse.ArgumentParser, *arguments: object, **named: object) -> None:
    raise Captured(parser)


def _parser_in(start: Callable[[], object], name: str) -> argparse.ArgumentParser:
    """The parser that a program makes before it does anything else."""
    with patch.object(argparse.ArgumentParser, "parse_known_args", _capture), patch.object(sys, "argv", [name]):
        try:
            start()
        except Captured as captured:
            return captured.parser
    raise AssertionError(f"{name} has read no arguments")


@cache
def nnunet_parser(program: str) -> argparse.ArgumentParser:
    """Of a command of nnU-Net.

    Raises:
        AssertionError: nnU-Net has no such command.
    """
    found = importlib.metadata.entry_points(group="console_scripts", name=program)
    assert found, f"nnU-Net has no command {program}"
    return _parser_in(next(iter(found)).load(), program)


@cache
def script_parser(script: str) -> argparse.ArgumentParser | None:
    """Of a script of this repository; None where it reads no arguments.

    Raises:
        AssertionError: there is no such script.
    """
    path = ROOT / script
    assert path.is_file(), f"there is no script {script}"
    if "ArgumentParser(" not in path.read_text(encoding="utf-8"):
        return None
    with patch.object(sys, "path", [str(path.parent), *sys.path]):
        return _parser_in(lambda: runpy.run_path(str(path), run_name="__main__"), script)


def check(words: Sequence[str]) -> None:
    """Parse a command as its program would.

    Raises:
        AssertionError: there is no such program, verb, target or flag.
    """
    program, arguments = words[0], [EXAMPLES.get(word, word) for word in words[1:]]
    if program == "make":
        _check_target(arguments)
    elif program == "nnunet_cfcl":
        _check_ours(arguments)
    elif program == "torchrun":
        _check_torchrun(arguments)
    elif program == "python":
        _check_python(arguments)
    else:
        _parsed(nnunet_parser(program), arguments)


def _check_target(arguments: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert arguments and set(arguments) <= set(targets), f"make has no target {arguments}, only {targets}"


def _check_ours(arguments: Sequence[str]) -> None:
    verb = arguments[0]
    assert verb in VERBS, f"nnunet_cfcl has no verb {verb}"
    found, others = _parsed(build_parser(verb), arguments, allow_others=True)
    if getattr(found, "passes_on", False):
        # the verb takes the flags of nnU-Net's own commands
        _parsed(nnunet_parser("nnUNetv2_predict_from_modelfolder" if "-m" in others else "nnUNetv2_predict"), others)
    else:
        assert not others, f"nnunet_cfcl {verb} does not know {others}"


def _check_torchrun(arguments: Sequence[str]) -> None:
    found = _parsed(get_args_parser(), arguments)[0]
    assert found.module and found.training_script == "nnunet_cfcl.pretrain", found
    _parsed(pretrain._parser(), found.training_script_args)


def _check_python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        name, rest = arguments[1], arguments[2:]
        if name == "nnunet_cfcl":
            _check_ours(rest)
        elif name == "nnunet_cfcl.pretrain":
            _parsed(pretrain._parser(), rest)
        else:
            _check_script(_script_of(name), rest)
    else:
        _check_script(arguments[0], arguments[1:])


def _script_of(module: str) -> str:
    path = Path(*module.split("."))
    return str(path / "__main__.py" if (ROOT / path).is_dir() else path.with_suffix(".py"))


def _check_script(script: str, arguments: Sequence[str]) -> None:
    parser = script_parser(script)
    if parser is None:
        assert not arguments, f"{script} reads no arguments, found {arguments}"
    else:
        _parsed(parser, arguments)


def _parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str], allow_others: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """As `parse_args`; what is wrong is an assertion that fails."""

    def fail(_: argparse.ArgumentParser, message: str) -> None:
        raise AssertionError(f"{parser.prog} does not take {' '.join(arguments)}: {message}")

    with patch.object(argparse.ArgumentParser, "error", fail):
        found, others = parser.parse_known_args(list(arguments))
    assert allow_others or not others, f"{parser.prog} does not know {others}"
    return found, others


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every flag of a parser and its parts."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from flags(part)
