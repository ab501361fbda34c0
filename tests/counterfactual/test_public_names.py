"""The public names of the counterfactual rooms."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = ("counterfactual", "counterfactual.acquisition", "counterfactual.gate", "counterfactual.generator")


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_can_be_imported_and_is_defined_in_the_module_that_the_stub_names(room):
    package = importlib.import_module(f"nnunet_cfcl.{room}")
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    imports = [(node.module, name.name) for node in stub.body if isinstance(node, ast.ImportFrom)
               for name in node.names]
    assert imports and sorted(package.__all__) == sorted(name for _, name in imports)
    for module, name in imports:
        defined = importlib.import_module(f"{package.__name__}.{module}")
        assert getattr(package, name) is getattr(defined, name)
        assert isinstance(getattr(package, name), int) or getattr(package, name).__module__ == defined.__name__


def test_importing_the_room_loads_no_heavy_package():
    command = "import sys, nnunet_cfcl.counterfactual\nassert not {'torch', 'nnunetv2', 'blosc2'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", command], check=True)
