"""The public names of data, pool, adapter, doctor and trainers, and the cost of importing these rooms."""

import subprocess
import sys

import pytest

from nnunet_cfcl import trainers


@pytest.mark.parametrize("room", ["nnunet_cfcl.data", "nnunet_cfcl.data.pool", "nnunet_cfcl.nnunet",
                                  "nnunet_cfcl.doctor"])
def test_every_public_name_can_be_imported_and_importing_the_room_is_cheap(room):
    script = (f"import sys, {room} as room\n"
              "assert 'torch' not in sys.modules and 'nnunetv2' not in sys.modules\n"
              "assert len(room.__all__) > 3 and all(hasattr(room, name) for name in room.__all__)\n")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_trainer_can_be_imported():
    assert len(trainers.__all__) > 10 and all(hasattr(trainers, name) for name in trainers.__all__)


def test_neither_protocol_and_attributes_nor_look_ups_and_doctor_import_nnunet():
    script = ("import sys\n"
              "import nnunet_cfcl.data.reader, nnunet_cfcl.doctor.run\n"
              "import nnunet_cfcl.nnunet.lookup, nnunet_cfcl.nnunet.compatibility\n"
              "assert 'torch' not in sys.modules and 'nnunetv2' not in sys.modules\n"
              "import nnunet_cfcl.data.attributes\n"
              "assert 'nnunetv2' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", script], check=True)
