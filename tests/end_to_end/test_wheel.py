"""The built wheel in a clean environment: its files, the drop-in folder, the shim in a real nnU-Net.

The environment borrows the heavy dependencies (torch and the like) from the running interpreter by a path file, but has
its own copy of nnU-Net, so that nothing here can change the one that is in use; nnunet_cfcl comes from the wheel alone.
"""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import nnunetv2
import pytest

pytestmark = pytest.mark.end_to_end

CHECKOUT = Path(__file__).parents[2]
LOOK_UP = """
import pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
assert recursive_find_trainer_class_by_name("nnUNetTrainer_250epochs").__module__.startswith("nnunetv2.")
try:
    found = recursive_find_trainer_class_by_name("nnUNetTrainerDVDCL")
except RuntimeError as error:
    assert "Could not find requested nnunet trainer" in str(error), error
    sys.exit(3)
assert pickle.loads(pickle.dumps(found)) is found
import nnunet_cfcl.trainers, nnunetv2
assert found is nnunet_cfcl.trainers.nnUNetTrainerDVDCL
print("nnunet_cfcl", nnunet_cfcl.__file__, "nnunetv2", nnunetv2.__file__, sep="\\n")
"""
NOT_FOUND = 3


def run(command: list[str | Path], **variables: str) -> subprocess.CompletedProcess:
    """Runs outside of the checkout, without its paths and nnU-Net's variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet", "PYTHONPATH"))}
    return subprocess.run(list(map(str, command)), cwd="/", env={**clean, **variables}, capture_output=True, text=True,
                          timeout=600)


def checked(command: list[str | Path], **variables: str) -> str:
    done = run(command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what the wheel is built from, so that no build folder stays in the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("nnunet_cfcl", "trainers"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(CHECKOUT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    checked([sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, sources])
    built, = out.glob("*.whl")
    return built


def make_environment(folder: Path) -> Path:
    """An environment with a copy of nnU-Net and a view of the running one's packages; returns its Python."""
    checked([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    packages = Path(checked([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # path files in a folder named by a path file are not read: an editable nnunet_cfcl there stays out of sight
    borrowed = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    shutil.copytree(Path(nnunetv2.__file__).parent, packages / "nnunetv2")
    assert run([python, "-c", "import nnunet_cfcl"]).returncode != 0
    return python


def pip_install(python: Path, *what: str | Path) -> None:
    # --ignore-installed: the borrowed folder may hold the record of an editable installation, not ours to remove
    checked([sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--no-deps",
             "--no-index", "--no-build-isolation", "--ignore-installed", *what])


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with the wheel installed."""
    python = make_environment(tmp_path_factory.mktemp("environment"))
    pip_install(python, wheel)
    return python.parent


def look_up(python: Path, **variables: str) -> subprocess.CompletedProcess:
    return run([python, "-c", LOOK_UP], **variables)


def test_the_wheel_holds_every_module_of_the_checkout_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(CHECKOUT)) for file in (CHECKOUT / "nnunet_cfcl").rglob("*.py")}
    expected |= {f"nnunet_cfcl/_dropin/{file.name}" for file in (CHECKOUT / "trainers").glob("*.py")}
    expected |= {str(file.relative_to(CHECKOUT)) for file in (CHECKOUT / "nnunet_cfcl").rglob("*.j2")}
    assert names == expected | {"nnunet_cfcl/py.typed"}


def test_the_trainer_is_found_through_the_variable_and_is_the_wheels(environment):
    folder = checked([environment / "nnunet_cfcl", "trainers-path"])
    assert folder.count("\n") == 1
    assert Path(folder.strip()).is_relative_to(environment.parent.resolve())
    found = look_up(environment / "python", nnUNet_extTrainer=folder.strip())
    assert found.returncode == 0, found.stderr
    files = found.stdout.splitlines()
    for package in ("nnunet_cfcl", "nnunetv2"):
        assert Path(files[files.index(package) + 1]).is_relative_to(environment.parent)


def test_installed_into_nnunet_it_is_found_without_the_variable_and_uninstalled_without_a_trace(environment):
    python = environment / "python"
    # the first look-up, which finds nothing, also lets Python write all the byte code it will
    assert look_up(python).returncode == NOT_FOUND
    packages = next((environment.parent / "lib").iterdir()) / "site-packages"
    before = sorted(map(str, (packages / "nnunetv2").rglob("*")))
    assert "nnUNetTrainerDVDCL" in checked([environment / "nnunet_cfcl", "install"])
    found = look_up(python)
    assert found.returncode == 0, found.stderr
    assert sorted(map(str, (packages / "nnunetv2").rglob("*"))) != before
    checked([environment / "nnunet_cfcl", "uninstall"])
    assert sorted(map(str, (packages / "nnunetv2").rglob("*"))) == before
    assert "nothing to remove" in checked([environment / "nnunet_cfcl", "uninstall"])


def test_a_shim_left_behind_by_an_uninstalled_wheel_does_not_break_stock_nnunet(wheel, tmp_path):
    python = make_environment(tmp_path / "environment")
    pip_install(python, wheel)
    checked([python, "-m", "nnunet_cfcl", "install"])
    checked([sys.executable, "-m", "pip", "--python", python, "uninstall", "--yes", "nnunet_cfcl"])
    abandoned = look_up(python)
    assert abandoned.returncode == NOT_FOUND, abandoned.stderr
    assert "nnunet_cfcl, which is not installed here any more" in abandoned.stderr


def test_an_editable_installation_finds_the_same_trainers_in_the_checkout(sources, tmp_path):
    python = make_environment(tmp_path / "environment")
    pip_install(python, "--editable", sources)
    folder = checked([python, "-m", "nnunet_cfcl", "trainers-path"]).strip()
    assert Path(folder) == (sources / "trainers").resolve()
    found = look_up(python, nnUNet_extTrainer=folder)
    assert found.returncode == 0, found.stderr
    assert str(sources) in found.stdout
