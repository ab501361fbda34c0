"""The Dockerfile, as far as can be without a container engine: its files, its commands, its user."""

import fnmatch
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.compatibility.environments import CHECKOUT, SOURCES
from tests.docs.pages import commands
from tests.docs.parsers import check

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def instructions() -> list[tuple[str, str]]:
    """Instruction and the rest of its line, continued lines joined, comments left out."""
    lines = [line for line in (CHECKOUT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def all_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def copied() -> list[str]:
    return [source for rest in all_of("COPY") for source in rest.split()[:-1]]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in all_of("ENV") for pair in shlex.split(rest))


def test_the_base_image_is_pinned_to_a_full_version():
    base, = all_of("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_what_is_copied_is_there_and_is_all_that_the_package_is_built_from():
    assert sorted(copied()) == sorted(SOURCES)
    assert all((CHECKOUT / source).exists() for source in copied())


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_copied_is_not_ignored(source):
    ignored = False
    for line in (CHECKOUT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(source, pattern.lstrip("!")):
            ignored = not pattern.startswith("!")  # the last line that fits decides
    assert not ignored


def test_nothing_else_of_the_checkout_reaches_the_engine():
    lines = [line for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*" and {line[1:] for line in lines if line.startswith("!")} == set(SOURCES)
    assert "**/__pycache__" in lines


@pytest.mark.parametrize("script", all_of("RUN"))
def test_its_shell_commands_are_sound(script):
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    for command in script.split("&&"):
        words = shlex.split(command)
        if words[0] == "nnunet_cfcl":
            check(words)


def test_without_a_command_it_asks_the_doctor():
    check(json.loads(all_of("CMD")[-1]))


def test_it_ends_with_a_user_without_rights_who_owns_the_folders():
    names = [instruction for instruction, _ in instructions()]
    user, = all_of("USER")
    assert user not in ("root", "0") and names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert any(f"useradd --create-home --uid \"$UID\" {user}" in script and f"chown -R {user} /data" in script
               for script in all_of("RUN"))


def test_nnunets_folders_are_volumes_and_its_variables_name_them():
    volumes = json.loads(all_of("VOLUME")[0])
    assert [environment()[name] for name in FOLDERS] == volumes == [f"/data/{name}" for name in FOLDERS]


def test_the_how_to_mounts_these_folders_and_runs_commands_that_exist():
    page = CHECKOUT / "docs" / "how-to" / "cluster.md"
    text = page.read_text()
    for volume in json.loads(all_of("VOLUME")[0]):
        assert re.search(rf"-v \S+:{volume}(:ro)? ", text), volume
    within = list(map(shlex.split, re.findall(r"^ +(?:nnunet_cfcl )?(nnUNetv2_train .+)$", text, re.M)))
    assert len(within) == 2
    for words in within:
        check(words)
    assert any(command.words[0] == "nnunet_cfcl" for command in commands(page))


def test_the_files_that_are_copied_are_those_of_the_checkout_alone():
    assert not [source for source in copied() if Path(source).is_absolute() or ".." in source]
