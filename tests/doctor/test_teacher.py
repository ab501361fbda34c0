"""The doctor on phase 3: with a pool, without one, demanded without one."""

import pytest

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.data.pool.manifest import CaseRecord, Manifest, pool_folder, write_manifest
from nnunet_cfcl.doctor.teacher import check_pool
from tests.toy_dataset import DATASET

BLOCK = {"data_identifier": "nnUNetPlans_2d"}


def result(**settings):
    return check_pool(resolve_settings(settings), DATASET, "nnUNetPlans", "2d", BLOCK)


@pytest.fixture
def pool(toy):
    """The manifest of a preprocessed pool of three images."""
    record = CaseRecord((1, 1, 24, 24), False, 1.0, False, False, (), "", "")
    folder = pool_folder(toy / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_2d")
    write_manifest(folder, Manifest("hash", True, {f"new_{n}": record for n in range(3)}))
    return toy / "nnUNet_raw" / DATASET


def test_a_pool_is_counted_with_its_scanners(pool):
    assert result().message == "phase 3 learns from 3 images of the pool, drawn alike"
    (pool / "attributes.csv").write_text("case,scanner\nnew_0,A\nnew_1,B\nnew_2,B\n")
    found = result()
    assert found.status == "ok" and found.message.endswith("3 images of the pool, drawn evenly over scanner (A, B)")
    assert result(**{"teacher.balance": "site"}).message.endswith("drawn alike")


def test_without_a_pool_phase_3_will_be_skipped(toy):
    found = result()
    assert found.status == "warn" and "phase 3 will be skipped" in found.message
    assert "imagesUn" in found.fix and "nnunet_cfcl pool -d 7 -c 2d" in found.fix


def test_phase_3_demanded_without_a_pool_fails(toy):
    found = result(**{"teacher.enabled": True})
    assert found.status == "FAIL" and "teacher.enabled is true" in found.message
