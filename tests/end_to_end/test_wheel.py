"""Wheel and sdist: their bytes, their files, the drop-in folder, the shim in a real nnU-Net, a read-only installation.

The wheel is installed into a clean environment, which borrows the heavy dependencies (torch and the like) from the
running interpreter, but has its own copy of nnU-Net, so that nothing here can change the one that is in use;
nnunet_cfcl comes from the wheel alone.
"""

import json
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import nnunetv2
import pytest

from tests.compatibility import environments
from tests.compatibility.environments import CHECKOUT, build, checked, copy_sources, packages_of, pip, pip_install, run
from tests.end_to_end.conftest import PLANS, TRAINER, shorten_plans

pytestmark = pytest.mark.end_to_end

EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}
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


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build("wheel", sources, tmp_path_factory.mktemp("dist"), **EPOCH)


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory) -> Path:
    return build("sdist", sources, tmp_path_factory.mktemp("dist"), **EPOCH)


def make_environment(folder: Path) -> Path:
    """An environment with a copy of nnU-Net and its commands; returns its Python."""
    python = environments.make_environment(folder)
    packages, installed = packages_of(python), Path(nnunetv2.__file__).parents[1]
    shutil.copytree(installed / "nnunetv2", packages / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    assert run([python, "-c", "import nnunet_cfcl"]).returncode != 0
    return python


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with the wheel installed."""
    python = make_environment(tmp_path_factory.mktemp("environment"))
    pip_install(python, wheel)
    return python.parent


def look_up(python: Path, **variables: str) -> subprocess.CompletedProcess:
    return run([python, "-c", LOOK_UP], **variables)


def modules() -> set[str]:
    """Every file of the package in the checkout that belongs into a distribution."""
    package = CHECKOUT / "nnunet_cfcl"
    files = [*package.rglob("*.py"), *package.rglob("*.pyi"), *package.rglob("*.j2"), package / "py.typed"]
    return {str(file.relative_to(CHECKOUT)) for file in files}


def test_the_wheel_holds_every_module_of_the_package_and_nothing_else(wheel, sources):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {str(file.relative_to(sources)) for file in (sources / "nnunet_cfcl").rglob("*") if file.is_file()}
    assert expected == modules(), "nothing else lies in the package's folder"
    expected |= {f"nnunet_cfcl/_dropin/{file.name}" for file in (CHECKOUT / "trainers").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    about = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert about == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def test_the_sdist_holds_what_the_wheel_is_built_from_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        entries = [entry for entry in archive.getmembers() if not entry.isdir()]
    names = {entry.name.partition("/")[2] for entry in entries}
    made = {name for name in names if name.startswith("nnunet_cfcl.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    plain = {name for name in environments.SOURCES if (CHECKOUT / name).is_file()}
    dropin = {f"trainers/{file.name}" for file in (CHECKOUT / "trainers").glob("*.py")}
    assert names - made == modules() | plain | dropin
    assert {(entry.uid, entry.uname, entry.mtime, entry.mode) for entry in entries} == {(0, "", 1700000000, 0o644)}


def test_building_twice_gives_the_same_bytes(sources, wheel, sdist, tmp_path):
    again = tmp_path / "sources"
    usual = os.umask(0o077)  # of one who lets nobody read their files
    try:
        shutil.copytree(sources, again, ignore=shutil.ignore_patterns("build", "*.egg-info"),
                        copy_function=shutil.copyfile)
        assert stat.S_IMODE((again / "pyproject.toml").stat().st_mode) == 0o600
        assert build("wheel", again, tmp_path / "wheel", **EPOCH).read_bytes() == wheel.read_bytes()
        assert build("sdist", again, tmp_path / "sdist", **EPOCH).read_bytes() == sdist.read_bytes()
    finally:
        os.umask(usual)


def test_the_wheel_that_is_built_from_the_sdist_is_the_same(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked, = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    assert build("wheel", unpacked, tmp_path / "dist", **EPOCH).read_bytes() == wheel.read_bytes()


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
    pip(python, "uninstall", "--yes", "nnunet_cfcl")
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


THREE_LINES = """
export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)
nnUNetv2_train 900 2d 0 -tr {trainer} -p {plans} -device cpu
"""


def _read_only(script: str, *folders: Path) -> list[str]:
    """A command that runs a shell script while these folders are mounted read-only, for it alone."""
    mounts = "".join(f"mount --bind '{one}' '{one}' && mount -o remount,ro,bind '{one}' && " for one in folders)
    return ["unshare", "--mount", "sh", "-ec", f"{mounts} true\n{script}"]


@pytest.fixture
def phantom(environment, tmp_path) -> dict[str, str]:
    """nnU-Net's variables: a preprocessed dataset of six small pictures, made by the environment's commands."""
    folders = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir()
    checked([environment / "nnunet_cfcl", "phantom", "--out", folders["nnUNet_raw"], "--patients", "6",
             "--test-patients", "2", "--shape", "64", "64"])
    module = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
    checked([environment / "python", "-c", f"from {module} import plan_and_preprocess_entry as run; run()", "-d", "900",
             "-c", "2d", "-np", "1", "-npfp", "1"], **folders, nnUNet_def_n_proc="1")
    shorten_plans(tmp_path / "preprocessed" / "Dataset900_Phantom2D", batch_2d=2)
    short = {"epochs": 1, "iterations_per_epoch": 1}
    settings = {"pretrain": {**short, "images_per_step": 2, "points_per_image": 50}, "chromap": {"reducer": "pca"},
                "finetune": {**short, "val_iterations_per_epoch": 1}, "counterfactual": {"source": "acquisition"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return {**folders, "nnUNet_cfcl_config": str(tmp_path / "settings.json"), "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1"}


@pytest.mark.nightly
@pytest.mark.skipif(subprocess.run(["unshare", "--mount", "mount", "--bind", "/tmp", "/tmp"], capture_output=True)
                    .returncode != 0, reason="folders cannot be mounted read-only here")
def test_the_three_lines_of_the_readme_train_from_an_installation_that_cannot_be_written(environment, phantom):
    command = environment / "nnUNetv2_train"
    command.write_text(f"#!{environment / 'python'}\nfrom nnunetv2.run.run_training import run_training_entry\n"
                       # processes that are spawned read it too
                       "if __name__ == '__main__':\n    run_training_entry()\n")
    command.chmod(0o755)
    packages = packages_of(environment / "python")
    before = sorted(map(str, packages.rglob("*")))
    lines = THREE_LINES.format(trainer=TRAINER, plans=PLANS)
    refused = f"if touch '{packages}/nnunet_cfcl/written' 2> /dev/null; then exit 9; fi\n"
    output = checked(_read_only(refused + lines, environment.parent), **phantom,
                     PATH=f"{environment}{os.pathsep}{os.environ['PATH']}")
    assert "Phase 1: DVD-CL" in output and "Mean Validation Dice" in output
    model = Path(phantom["nnUNet_results"]) / "Dataset900_Phantom2D" / f"{TRAINER}__{PLANS}__2d" / "fold_0"
    assert (model / "checkpoint_final.pth").exists() and (model / "cfcl" / "chromap_space.npz").exists()
    assert sorted(map(str, packages.rglob("*"))) == before
