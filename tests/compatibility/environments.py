"""Python environments that borrow the heavy packages (torch and the like) of the one that is running.

A path file names the running environment's packages; what is installed into the new one comes first. Path files in a
folder that a path file names are not read: an editable nnunet_cfcl there stays out of sight.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
#: What a wheel and an sdist are built from.
SOURCES = ("nnunet_cfcl", "trainers", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md",
           "LICENSE", "CITATION.cff")
PIP_INSTALL = ("install", "--disable-pip-version-check", "--no-deps", "--ignore-installed")


def run(command: Sequence[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs outside of the checkout, without its paths and nnU-Net's variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet", "PYTHONPATH"))}
    return subprocess.run(list(map(str, command)), cwd="/", env={**clean, **variables}, capture_output=True, text=True,
                          timeout=600)


def checked(command: Sequence[str | Path], **variables: str) -> str:
    """The output of a command that must not fail."""
    done = run(command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_sources(target: Path) -> Path:
    """What the wheel is built from, so that no build folder stays in the checkout."""
    for name in SOURCES:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target / name)
    return target


def build(kind: str, sources: Path, out: Path, **variables: str) -> Path:
    """The file that ``python -m build --KIND`` makes, "wheel" or "sdist"."""
    checked([sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, sources], **variables)
    built, = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def make_environment(folder: Path) -> Path:
    """A new environment; returns its Python."""
    checked([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    borrowed = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages_of(python) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def packages_of(python: Path) -> Path:
    """The environment's own folder of packages."""
    return Path(checked([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())


def pip(python: Path, *arguments: str | Path) -> str:
    """The running pip, at work in another environment."""
    return checked([sys.executable, "-m", "pip", "--python", python, *arguments])


def pip_install(python: Path, *what: str | Path) -> None:
    """Installs files of this machine, without their requirements."""
    # --ignore-installed: the borrowed folder may hold the record of an editable installation, not ours to remove
    pip(python, *PIP_INSTALL, "--no-index", "--no-build-isolation", *what)
