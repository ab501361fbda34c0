"""The drop-in folder, and the shim in an nnU-Net installation (tests/end_to_end/test_wheel.py uses a real one)."""

import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet import installation
from nnunet_cfcl.trainers.lookup import plugin_trainers


@pytest.fixture
def variants(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of nnU-Net's own ``variants``."""
    monkeypatch.setattr(installation, "shim_folder", lambda: tmp_path / installation.SHIM_FOLDER)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def load_shim(folder: Path):
    spec = importlib.util.spec_from_file_location("trainer_shim", folder / "trainer_shim.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drop_in_folder_holds_one_module_and_defines_no_class_itself():
    folder = installation.trainers_path()
    assert [module.name for module in pkgutil.iter_modules([str(folder)])] == ["nnunet_cfcl_trainers"]
    assert "class " not in (folder / "nnunet_cfcl_trainers.py").read_text().partition('"""\n\n')[2]


def test_a_package_that_is_importable_but_not_installed_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -e"):
        installation.trainers_path()


def test_only_classes_that_nnunet_accepts_as_trainers_are_offered():
    trainers = plugin_trainers()
    assert "nnUNetTrainerDVDCL" in trainers
    assert "CounterfactualPretraining" not in trainers


def test_the_shim_is_inside_the_nnunet_of_this_interpreter():
    import nnunetv2

    assert installation.shim_folder().is_relative_to(Path(nnunetv2.__file__).parent)


def test_installing_twice_is_the_same_as_once(variants):
    first = installation.install(plugin_trainers())
    before = {path: path.read_text() for path in first.iterdir()}
    assert installation.install(plugin_trainers()) == first
    assert {path: path.read_text() for path in first.iterdir()} == before


def test_uninstalling_leaves_no_trace_not_even_byte_code(variants):
    (variants / "stock.py").touch()
    before = listing(variants)
    folder = installation.install(plugin_trainers())
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)
    assert (folder / "__pycache__").is_dir()
    assert installation.uninstall() == folder
    assert listing(variants) == before


def test_uninstalling_without_a_shim_does_nothing(variants):
    assert installation.uninstall() is None


def test_foreign_files_beside_the_shim_are_not_deleted(variants):
    folder = installation.install(plugin_trainers())
    (folder / "mine.py").touch()
    with pytest.raises(UserError, match=r"mine\.py"):
        installation.uninstall()
    assert (folder / "mine.py").exists()


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_alternative(variants, monkeypatch):
    def deny(file, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(installation, "write_text_atomically", deny)
    with pytest.raises(UserError, match=r"Permission denied.*export nnUNet_extTrainer"):
        installation.install(plugin_trainers())
    assert listing(variants) == []


def test_nnunets_look_up_finds_our_trainer_in_the_shim_and_it_pickles(variants):
    import pickle

    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    import nnunet_cfcl.trainers
    installation.install(plugin_trainers())
    found = recursive_find_python_class(str(variants), "nnUNetTrainerDVDCL", None,
                                        cleanup_imports_from_base_folder=True)
    assert found is nnunet_cfcl.trainers.nnUNetTrainerDVDCL
    assert pickle.loads(pickle.dumps(found)) is found


def test_the_shim_imports_nothing_for_other_names(variants):
    script = (f"import sys; sys.path.insert(0, {str(installation.install(plugin_trainers()))!r}); import trainer_shim\n"
              "assert not hasattr(trainer_shim, 'nnUNetTrainer_250epochs')\n"
              "assert 'nnunet_cfcl' not in sys.modules and 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_shim_without_its_package_breaks_nothing_and_prints_the_reason(variants, monkeypatch, capsys):
    shim = load_shim(installation.install(plugin_trainers()))
    monkeypatch.setitem(sys.modules, "nnunet_cfcl", None)  # what Python does for a package that cannot be imported
    assert not hasattr(shim, "nnUNetTrainer")
    assert not hasattr(shim, "nnUNetTrainerDVDCL")
    assert "not installed here any more" in capsys.readouterr().err
