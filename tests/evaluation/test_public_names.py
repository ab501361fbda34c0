"""Public names of the evaluation, the demo and the command line."""

import importlib
import subprocess
import sys

import pytest

ROOMS = ("nnunet_cfcl.evaluation", "nnunet_cfcl.evaluation.masks", "nnunet_cfcl.evaluation.probe",
         "nnunet_cfcl.evaluation.report", "nnunet_cfcl.demo", "nnunet_cfcl.cli")


@pytest.mark.parametrize("name", ROOMS)
def test_every_exported_name_can_be_imported(name):
    room = importlib.import_module(name)
    assert room.__all__
    for exported in room.__all__:
        assert callable(getattr(room, exported)) or exported.isupper(), exported


def test_importing_the_rooms_imports_neither_torch_nor_nnunet():
    script = (f"import sys, {', '.join(ROOMS)}\n"
              "heavy = {'torch', 'nnunetv2', 'matplotlib', 'scipy', 'monai'} & set(sys.modules)\n"
              "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
