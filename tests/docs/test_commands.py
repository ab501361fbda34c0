"""Every command of the README and the documentation is one that its program takes; so is what sentences say of them."""

import ast
import importlib
import json
import re
import subprocess

import pytest

from nnunet_cfcl.cli import VERBS, build_parser
from nnunet_cfcl.config import resolve_settings, settings_keys
from nnunet_cfcl.trainers import __all__ as trainers
from tests.docs.pages import PAGES, ROOT, SHELLS, Command, blocks, commands, inline_code
from tests.docs.parsers import check, flags, nnunet_parser

COMMANDS = [command for page in PAGES for command in commands(page)]
FILE_ENDINGS = (".csv", ".md", ".png", ".pth", ".py")
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {' '.join(command.words)[:60]}")
def test_a_command_of_the_pages_is_taken_by_the_programs_own_parser(command):
    check(command.words)


def test_the_commands_are_found_in_fences_indented_blocks_continuations_and_substitutions(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Words.\n\n    nnUNet_cfcl_chromap=1 nnUNetv2_predict -i A \\\n        -o B   # words\n\n"
                    "```bash\nexport X=$(nnunet_cfcl trainers-path)\nls\nmake demo\n```\n\n```text\nmake tea\n```\n")
    assert commands(page) == [
        Command("page.md, line 3", ("nnUNetv2_predict", "-i", "A", "-o", "B")),
        Command("page.md, line 7", ("nnunet_cfcl", "trainers-path")), Command("page.md, line 9", ("make", "demo"))]
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("words", [
    "nnunet_cfcl pole -d 4 -c 2d", "nnunet_cfcl pool -d 4 -c 2d --fast", "nnunet_cfcl pool -d 4",
    "nnunet_cfcl generator teach -d 4 -c 2d -f 0", "nnunet_cfcl predict -i I -o O -d 4 -c 2d --chroma-map",
    "nnUNetv2_train 4 2d 0 --fast", "nnUNetv2_learn 4", "make tea", "python benchmarks/nothing.py",
    "python benchmarks/objectives.py --nothing", "python -m nnunet_cfcl.pretrain 4 2d 0 --fast",
    "torchrun --standalone --fast -m nnunet_cfcl.pretrain 4 2d 0", "torchrun -m nnunet_cfcl.pretrain 4 2d 0 --fast",
])
def test_a_command_that_its_program_would_refuse_is_found(words):
    with pytest.raises(AssertionError):
        check(words.split())


@BY_NAME
def test_verbs_and_flags_in_sentences_exist(page):
    for code in inline_code(page):
        program, *words = code.split()
        if program == "nnunet_cfcl" and words and words[0] != "VERB":
            verb = words[0].strip("|")
            assert verb in VERBS or verb == "--version", f"`{code}`"
            passed_on = flags(nnunet_parser("nnUNetv2_predict")) if verb == "predict" else ()
            known = {*flags(build_parser(verb if verb in VERBS else None)), *passed_on}
        elif program.startswith("nnUNetv2_") and program.isidentifier():
            known = set(flags(nnunet_parser(program)))
        else:
            continue
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in known]
        assert not unknown, f"`{code}`: {unknown}"


@BY_NAME
def test_settings_in_sentences_exist(page):
    keys = {key for key, _, _ in settings_keys()}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = {match[0] for code in inline_code(page) if (match := re.match(r"([a-z]+)\.[a-z_]+", code))
             and match[1] in sections}
    assert {name for name in named if not name.endswith(FILE_ENDINGS)} <= keys


def test_trainers_in_commands_exist():
    named = {(command.where, command.words[at + 1]) for command in COMMANDS
             for at, word in enumerate(command.words[:-1]) if word == "-tr"}
    stock = {"nnUNetTrainer"}
    assert {name for _, name in named if name.startswith("nnUNetTrainer")} <= {*trainers, *stock}, named


@BY_NAME
def test_code_of_the_pages_is_valid(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in SHELLS:
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"line {block.line}: {done.stderr}"
        elif block.language == "json":
            resolve_settings(json.loads(block.text))
        elif block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, one.name) for one in node.names), f"line {node.lineno + block.line - 1}"
