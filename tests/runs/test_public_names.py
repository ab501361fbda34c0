"""The public faces of the rooms of long runs and of the pretraining."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("room", ["nnunet_cfcl.runs", "nnunet_cfcl.pretraining"])
def test_every_public_name_can_be_imported_and_importing_the_room_is_cheap(room):
    script = (f"import sys, {room} as room\n"
              "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
              "assert len(room.__all__) > 10 and all(hasattr(room, name) for name in room.__all__)\n")
    subprocess.run([sys.executable, "-c", script], check=True)
