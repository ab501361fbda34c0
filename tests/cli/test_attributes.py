"""`nnunet_cfcl attributes discover` on small preprocessed images."""

import numpy as np
import pytest
from skimage import io

from nnunet_cfcl import cli
from nnunet_cfcl.cli.attributes import discover_attributes
from nnunet_cfcl.data.attribute_table import read_attribute_table
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.chunk_checksums import add_checksums

CASES = [*(f"toy_{n}" for n in range(6)), *(f"more{n:02d}" for n in range(18))]
TABLE, PICTURE = "attributes.csv", "attributes_discovered.png"


@pytest.fixture
def raw(toy):
    return toy / "nnUNet_raw" / "Dataset007_Toy"


@pytest.fixture
def two_scanners(save_case):
    """24 images, every third with much more noise."""
    y, x = np.indices((40, 48)) / 20 - 1
    for n, case in enumerate(CASES):
        random = np.random.default_rng(n)
        image = np.exp(-((y + random.uniform(-0.3, 0.3)) ** 2 + x**2)) * random.uniform(0.9, 1.1)
        image = image + random.normal(0, 0.1 if n % 3 == 0 else 0.01, image.shape)
        save_case(case, ((image - image.mean()) / image.std())[None, None])


def test_the_groups_are_written_as_a_table_with_a_figure_and_a_summary(raw, two_scanners, capsys):
    assert cli.main(["attributes", "discover", "-d", "7", "-np", "1"]) == 0
    table = read_attribute_table(raw)
    assert table.attributes == {
        "acquisition_group": {case: "B" if n % 3 == 0 else "A" for n, case in enumerate(CASES)}}
    assert io.imread(raw / PICTURE).shape[0] > 200
    lines = capsys.readouterr().out
    assert "24 cases in 2 groups (A 16, B 8)" in lines and "the groups are a proposal" in lines
    assert "stability under resampling (accepted from 0.8)" in lines and "\n  2: 1.00, " in lines


def test_an_existing_table_keeps_its_rows_and_columns(raw, two_scanners):
    (raw / TABLE).write_text('case,patient,note\ntoy_1,p1,"a, b"\nelsewhere,p2,\n')
    discover_attributes(7, "2d", log=lambda line: None)
    table = read_attribute_table(raw)
    assert table.cases[:2] == ("toy_1", "elsewhere") and sorted(table.cases[2:]) == sorted({*CASES} - {"toy_1"})
    assert table.columns["patient"][:3] == ("p1", "p2", "") and table.columns["note"][:2] == ("a, b", "")
    assert table.columns["acquisition_group"][:2] == ("A", "")
    with pytest.raises(UserError, match="already has the column acquisition_group; fix: rename or delete the column"):
        discover_attributes(7, "2d")


def test_a_single_group_writes_no_table(raw, save_case):
    for n, case in enumerate(CASES):
        save_case(case, np.random.default_rng(n).normal(size=(1, 1, 40, 48)))
    lines = []
    assert discover_attributes(7, log=lines.append).count == 1
    assert not (raw / TABLE).exists() and (raw / PICTURE).exists()
    assert "all 24 cases form one group" in lines[-1] and "no table written" in lines[-1] and "-n" in lines[-1]


def test_a_given_number_of_groups_is_used(raw, save_case, capsys):
    for n, case in enumerate(CASES):
        save_case(case, np.random.default_rng(n).normal(size=(1, 1, 40, 48)))
    assert cli.main(["attributes", "discover", "-d", "7", "-np", "2", "-n", "3"]) == 0
    assert set(read_attribute_table(raw).attributes["acquisition_group"].values()) == set("ABC")
    assert "24 cases in 3 groups" in capsys.readouterr().out


def test_too_few_or_no_preprocessed_cases_raise_with_the_command(raw, toy_cases):
    with pytest.raises(UserError, match="expected at least 20 cases, found 6 .*imagesUn.*nnunet_cfcl pool -d 7 -c 2d"):
        discover_attributes(7)
    for file in toy_cases.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no preprocessed cases in .*nnUNetv2_preprocess -d 7"):
        discover_attributes(7)


def test_a_damaged_case_is_named(raw, two_scanners, toy_cases):
    file = toy_cases / "more03.b2nd"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="more03.b2nd cannot be read, .*; fix: run nnUNetv2_preprocess again"):
        discover_attributes(7)
    file.write_bytes(whole)
    add_checksums(file)
    sealed = bytearray(file.read_bytes())
    sealed[len(whole) // 2] ^= 1
    file.write_bytes(sealed)
    with pytest.raises(UserError, match="more03.b2nd cannot be read, .*checksum"):
        discover_attributes(7)


def test_a_case_with_nan_is_named(raw, two_scanners, save_case):
    save_case("more03", np.full((1, 1, 40, 48), np.nan))
    with pytest.raises(UserError, match="case 'more03' holds values that are not finite"):
        discover_attributes(7)
    assert not (raw / TABLE).exists()


def test_the_pool_is_grouped_with_the_labelled_cases(raw, two_scanners, toy_cases):
    from nnunet_cfcl.data.pool.run import preprocess_pool

    (raw / "imagesUn").mkdir()
    y, x = np.indices((40, 48)) / 20 - 1
    image = np.exp(-(y**2 + x**2)) + np.random.default_rng(99).normal(0, 0.1, (40, 48))
    io.imsave(raw / "imagesUn" / "un_0_0000.png", (60 + 100 * image).astype(np.uint8), check_contrast=False)
    preprocess_pool("7", "2d", log=lambda line: None)
    assert len(discover_attributes(7, log=lambda line: None).groups) == 25
    assert read_attribute_table(raw).attributes["acquisition_group"]["un_0"] == "B"
