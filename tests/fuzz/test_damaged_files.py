"""A file that is cut short, or in which a bit is flipped, is told from a sound one, named, with what mends it."""

import dataclasses
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.training import save_generator
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.attribute_table import read_attribute_table
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.pool.manifest import CaseRecord, Manifest, pool_folder, read_manifest, write_manifest
from nnunet_cfcl.data.pool.preprocess import CasePreprocessing
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files import chunk_checksums
from nnunet_cfcl.phases.attributes_of_cases import known_attributes
from nnunet_cfcl.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.counterfactual.random_generator import random_generator
from tests.fuzz.readers import ARRAY, READERS

FLIPS = 60
WHOLE = tuple(slice(0, size) for size in ARRAY.shape[1:])
#: Sizes in bytes that a file of so many is cut to.
CUTS = (lambda whole: 0, lambda whole: 1, lambda whole: whole // 3, lambda whole: whole // 2, lambda whole: whole - 100,
        lambda whole: whole - 1)


def same(one, other):
    """Whether nested containers hold the same numbers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return bool(np.array_equal(one, other))


def checkpoint(folder):
    content = {"network_weights": {"conv": torch.arange(300.0)}, "epoch": 3, "identity": {"cases": ["a", "b"]}}
    save_checkpoint(content, folder / "checkpoint_latest.pth")
    return folder / "checkpoint_latest.pth", lambda: load_checkpoint(folder / "checkpoint_latest.pth")


def generator(folder):
    save_generator(random_generator(), folder / "generator.pth")
    return folder / "generator.pth", lambda: CounterfactualGenerator.load(folder / "generator.pth").state()


def counterfactual(folder):
    store = CounterfactualStore.create(folder, ["scanner"], "test")
    store.write("case", "scanner", ARRAY, (1, 2, 8, 8), (1, 1, 4, 4))
    return store.path("case", "scanner"), lambda: CounterfactualStore.open(folder).read("case", "scanner")


def pool_image(folder):
    pool = pool_folder(folder / "nnUNetPlans_3d")
    pool.mkdir(exist_ok=True)
    plan = SimpleNamespace(patch_size=(4, 8, 8))
    dataset = SimpleNamespace(preprocessed=folder / "nnUNetPlans_3d", configuration=plan)
    labels = (np.arange(2 * ARRAY.size).reshape(2, *ARRAY.shape[1:]) % 97).astype(np.int16)
    files = CasePreprocessing(dataset)._write(SimpleNamespace(name="case", training=False), ARRAY, labels, {})
    record = CaseRecord(ARRAY.shape, True, 1.0, False, False, files, "", "")
    write_manifest(pool, Manifest("", True, {"case": record}))
    return pool / "case.b2nd", lambda: PreprocessedCases(str(pool), ["case"]).read("case", WHOLE)


def pool_labels(folder):
    file = pool_image(folder)[0].with_name("case_seg.b2nd")
    return file, lambda: SilverLabels(folder / "nnUNetPlans_3d").read("case", WHOLE)


def color_space(folder):
    features = np.random.default_rng(0).normal(size=(60, 5))
    ColorSpace.fit(features, reducer="pca", identity="abc").save(folder / "chromap_space.npz")
    return folder / "chromap_space.npz", lambda: ColorSpace.load(folder / "chromap_space.npz")


def of_reader(name, read):
    reader = next(one for one in READERS if one.name == name)

    def make(folder):
        reader.make(folder)
        return folder / reader.file, lambda: read(folder)

    return make


KINDS = {
    "checkpoint": (checkpoint, "repeat the command that wrote it"),
    "generator": (generator, "nnunet_cfcl generator train"),
    "counterfactual": (counterfactual,
                       "`nnunet_cfcl generator generate` or `nnunet_cfcl counterfactuals import` again"),
    "colour space": (color_space, "nnunet_cfcl chromap"),
    "pool image": (pool_image, "nnunet_cfcl pool"),
    "pool labels": (pool_labels, "nnunet_cfcl pool"),
    "pool manifest": (of_reader("pool manifest", lambda folder: read_manifest(folder / "pool")), "nnunet_cfcl pool"),
    "copy of the attributes": (of_reader("copy of the attributes", known_attributes), "nnunet_cfcl generator train"),
}


@pytest.fixture(autouse=True)
def no_raw_data(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_short_is_named_with_what_mends_it(tmp_path, kind):
    make, mend = KINDS[kind]
    file, read = make(tmp_path)
    whole = file.read_bytes()
    for size in (cut(len(whole)) for cut in CUTS):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            read()
        assert str(file) in str(error.value) and mend in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_noticed_wherever_it_changes_what_is_read(tmp_path, kind):
    make, mend = KINDS[kind]
    file, read = make(tmp_path)
    whole, sound, draw, noticed = file.read_bytes(), read(), random.Random(0), 0
    for _ in range(FLIPS):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        try:
            assert same(sound, read())
        except UserError as error:
            noticed += 1
            assert str(file) in str(error) and mend in str(error)
    # some bytes of an archive mean nothing
    assert noticed > FLIPS / 3


def test_a_table_of_attributes_that_is_cut_within_a_row_is_named_with_the_row(tmp_path):
    file, read = of_reader("attributes.csv", read_attribute_table)(tmp_path)
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"attributes\.csv has 1 errors: line 25 has 3 cells, expected 4; fix: correct"):
        read()


def test_a_table_of_attributes_that_is_filled_up_with_zeros_or_is_no_text_is_named(tmp_path):
    file, read = of_reader("attributes.csv", read_attribute_table)(tmp_path)
    whole = file.read_bytes()
    for content in (whole[:-40] + bytes(40), whole.replace(b"case_03", b"case\xb0\xb3")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"attributes\.csv cannot be read as a table .* save it in this format"):
            read()


def test_counterfactuals_without_checksums_are_read_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_cfcl.counterfactual.store.write_checksums", lambda array: None)
    _, read = counterfactual(tmp_path)
    assert np.array_equal(read(), ARRAY)


def test_a_chunk_is_checked_once_and_only_where_it_is_read(tmp_path, monkeypatch):
    counterfactual(tmp_path)
    store, summed = CounterfactualStore.open(tmp_path), []
    plain = chunk_checksums.zlib.crc32
    monkeypatch.setattr(chunk_checksums.zlib, "crc32", lambda data: (summed.append(type(data)), plain(data))[1])
    box = (slice(0, 2), slice(0, 8), slice(0, 8))
    for _ in range(2):
        assert np.array_equal(store.read("case", "scanner", box), ARRAY[:, :2, :8, :8])
    # the header in each read, the checksums' own in the first, and the one chunk of eight that the box is in
    assert len(summed) == 2 + 1 + 1
    store.read("case", "scanner")
    assert len(summed) == 3 + 2 + 8


def test_no_reader_leaves_a_file_open_or_changes_it(tmp_path):
    for kind, (make, _) in KINDS.items():
        folder = tmp_path / kind.replace(" ", "_")
        folder.mkdir()
        file, read = make(folder)
        before = file.read_bytes()
        read()
        assert file.read_bytes() == before
        if os.path.isdir("/proc/self/fd"):
            held = [os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{one}")]
            assert str(file) not in held
