"""The montage: what is where in the written picture, in which shape, and which way up."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy.ndimage import find_objects, gaussian_filter, label

from nnunet_cfcl.chromap import montage as module
from nnunet_cfcl.chromap.montage import write_montage
from nnunet_cfcl.chromap.nifti import Geometry

NO_WHEEL = np.zeros((8, 8, 4), np.uint8)
RED = (255, 0, 0)


class Drawn(NamedTuple):
    """What was drawn: boxes (left, down, width, height) of the pictures, and all texts."""

    boxes: list[tuple[int, int, int, int]]
    words: list[str]

    @property
    def coloured(self) -> list[tuple[int, int, int, int]]:
        """Boxes of the colours: the wheel comes first, then each image and its colours."""
        return self.boxes[2::2]


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    """Filled by the montages written since."""
    found = Drawn([], [])
    show, write = module._Page.show, module._Page.write

    def kept_show(page, *box_and_picture):
        found.boxes.append(box_and_picture[:4])
        show(page, *box_and_picture)

    def kept_write(page, left, down, words, *rest, **style):
        found.words.append(words)
        write(page, left, down, words, *rest, **style)

    monkeypatch.setattr(module._Page, "show", kept_show)
    monkeypatch.setattr(module._Page, "write", kept_write)
    return found


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def uniform(shape: tuple[int, ...], color: tuple[int, int, int] = RED) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8), (*shape, 3))


def smooth_colors(shape: tuple[int, ...]) -> np.ndarray:
    """Waves of their own direction in each channel."""
    z, y, x = (np.arange(n, dtype=np.float32) / 15 for n in shape)
    colors = np.empty((*shape, 3), np.uint8)
    for channel, (a, b, c) in enumerate(((1, 0.4, -0.3), (-0.2, 1, 0.5), (0.3, -0.6, 1))):
        colors[..., channel] = 127 + 120 * np.sin(a * z[:, None, None] + b * y[:, None] + c * x)
    return colors


def pixel_in(picture: np.ndarray, box: tuple[int, int, int, int], across: float, down: float) -> list[int]:
    """At a part of the width and of the height of a panel."""
    left, top, width, height = box
    return picture[int(top + down * height), int(left + across * width)].tolist()


def test_a_sphere_is_round_in_all_panels_whatever_the_voxels_are(tmp_path):
    spacing = (1.5, 1.0, 0.5)
    shape = (60, 92, 180)
    z, y, x = ((np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing))
    sphere = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < 40**2
    write_montage(tmp_path / "a.png", np.zeros(shape), uniform(shape), sphere, None, spacing, NO_WHEEL, "", alpha=1.0)
    picture = pixels(tmp_path / "a.png")
    # half red where pixels are a mean of voxels; texts are as green as they are red
    regions, count = label((picture[..., 0] > 127) & (picture[..., 1] < 64))
    assert count == 9
    sizes = [(part[0].stop - part[0].start, part[1].stop - part[1].start) for part in find_objects(regions)]
    for height, width in sizes:
        assert width > 40 and height / width == pytest.approx(1, abs=0.05)
    # planes come one below the other, and all have one scale
    largest = [max(width for _, width in sizes[start : start + 3]) for start in (0, 3, 6)]
    assert max(largest) / min(largest) == pytest.approx(1, abs=0.03)


def affine_towards(codes: str) -> np.ndarray:
    towards = {"L": (0, -1), "R": (0, 1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.diag((0.0, 0.0, 0.0, 1.0))
    for axis, code in enumerate(codes):
        row, sign = towards[code]
        affine[row, axis] = sign
    return affine


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "ASL", None])
def test_superior_and_anterior_are_up_and_the_patients_left_is_on_the_right(tmp_path, drawn, codes):
    affine = affine_towards(codes or "LPS")
    shape = (10, 12, 14)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)[..., ::-1]
    patient = index @ affine[:3, :3].T
    # one channel for each direction: left, anterior, superior
    towards = patient * (-1, 1, 1)
    colors = np.where(towards > np.median(towards, (0, 1, 2)), 255, 0).astype(np.uint8)
    write_montage(tmp_path / "a.png", np.zeros(shape), colors, None, None, (1, 1, 1), NO_WHEEL, "", 1.0, per_plane=1,
                  geometry=None if codes is None else Geometry.of_affine(affine))
    picture = pixels(tmp_path / "a.png")
    axial, coronal, sagittal = drawn.coloured
    for panel, (rightwards, upwards) in ((axial, (0, 1)), (coronal, (0, 2)), (sagittal, (1, 2))):
        # the nose is on the left of a sagittal slice
        near, far = (0.9, 0.1) if rightwards == 0 else (0.1, 0.9)
        assert pixel_in(picture, panel, near, 0.5)[rightwards] == 255
        assert pixel_in(picture, panel, far, 0.5)[rightwards] == 0
        assert pixel_in(picture, panel, 0.5, 0.1)[upwards] == 255
        assert pixel_in(picture, panel, 0.5, 0.9)[upwards] == 0
    letters = [word for word in drawn.words if len(word) == 1]
    assert letters == ([] if codes is None else list("RLARLSAPS"))


def test_slices_are_named_by_their_place_in_the_file(tmp_path, drawn):
    mask = np.zeros((20, 24, 28), np.uint8)
    mask[4, 5, 6] = 1
    write_montage(tmp_path / "a.png", np.zeros(mask.shape), uniform(mask.shape), None, mask, (1, 1, 1), NO_WHEEL, "",
                  per_plane=1, geometry=Geometry.of_affine(affine_towards("PIR")))
    names = [word for word in drawn.words if "=" in word and "colour" not in word]
    assert names == ["axial, y = 5", "coronal, x = 6", "sagittal, z = 4"]


def test_image_and_colours_lie_side_by_side_with_colour_only_inside(tmp_path, drawn):
    image = np.zeros((8, 10, 12))
    image[:, :, 6:] = 100
    inside = np.zeros(image.shape, bool)
    inside[:, :5] = True
    write_montage(tmp_path / "a.png", image, uniform(image.shape), inside, None, (1, 1, 1), NO_WHEEL, "")
    picture = pixels(tmp_path / "a.png")
    plain, coloured = drawn.boxes[1], drawn.boxes[2]
    assert pixel_in(picture, plain, 0.2, 0.2) == [0, 0, 0] and pixel_in(picture, plain, 0.8, 0.2) == [255] * 3
    assert pixel_in(picture, coloured, 0.2, 0.8) == [0, 0, 0] and pixel_in(picture, coloured, 0.8, 0.8) == [255] * 3
    np.testing.assert_allclose(pixel_in(picture, coloured, 0.2, 0.2), (128, 0, 0), atol=4)
    np.testing.assert_allclose(pixel_in(picture, coloured, 0.8, 0.2), (255, 127, 127), atol=4)


def test_labels_have_an_outline_where_they_end_also_at_the_edge_of_the_image(tmp_path, drawn):
    mask = np.zeros((6, 10, 10), np.int16)
    mask[:, :5, 2:7] = 3
    write_montage(tmp_path / "a.png", np.zeros(mask.shape), uniform(mask.shape), None, mask, (1, 1, 1), NO_WHEEL, "",
                  1.0, labels={3: "tumour"})
    picture = pixels(tmp_path / "a.png")
    left, down, width, height = drawn.coloured[0]
    panel = picture[down : down + height, left : left + width]
    step = width / 10
    rows, columns = np.nonzero(panel[..., 1] > 100)
    assert abs(columns.min() - 2 * step) < 3 and abs(columns.max() - 7 * step) < 3
    assert rows.min() < 3 and abs(rows.max() - 5 * step) < 3
    inner = panel[8 : int(5 * step) - 8, int(2 * step) + 8 : int(7 * step) - 8]
    assert (inner == RED).all() and (panel[int(5 * step) + 8 :] == RED).all()
    assert "tumour" in drawn.words and "outlines" in drawn.words


def test_the_legend_names_all_labels_that_have_an_outline_of_their_own_and_counts_the_others(tmp_path, drawn):
    mask = np.arange(12).repeat(20).reshape(1, 12, 20)
    write_montage(tmp_path / "a.png", np.zeros(mask.shape), uniform(mask.shape), None, mask, (1, 1, 1), NO_WHEEL, "",
                  labels={2: "a name that is much too long for the side of the picture"})
    assert [word for word in drawn.words if word.startswith("label ")] == [f"label {n}" for n in (1, *range(3, 9))]
    assert any(word.startswith("a name") and len(word) <= 24 for word in drawn.words) and "and 3 more" in drawn.words
    assert len({module._style(number) for number in range(module.NAMED)}) == module.NAMED


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 30, 40), (30, 1, 40), (2, 50, 60), (1, 1, 9), (1, 1, 1), (200, 9, 3)])
@pytest.mark.parametrize("kind", ["no mask", "empty mask", "a voxel"])
def test_no_picture_is_empty_whatever_the_volume(tmp_path, drawn, shape, kind):
    mask = None if kind == "no mask" else np.zeros(shape, np.uint8)
    if kind == "a voxel" and mask is not None:
        mask[-1, -1, -1] = 1
    write_montage(tmp_path / "a.png", np.zeros(shape), uniform(shape), None, mask, (2.0, 1.0, 1.0), NO_WHEEL, "t", 1.0)
    picture = pixels(tmp_path / "a.png")
    assert (picture == RED).all(-1).sum() > 1000
    assert max(picture.shape) < 2000
    panels = len(drawn.coloured)
    assert panels >= (3 if min(shape) > 1 else 1)
    assert ("outlines" in drawn.words) == (kind == "a voxel")


def test_a_picture_without_slices_has_no_plane_and_one_without_spacing_no_millimetres(tmp_path, drawn):
    shape = (1, 40, 50)
    write_montage(tmp_path / "a.png", np.zeros(shape), uniform(shape), None, None, (999, 1, 1), NO_WHEEL, "X-ray")
    assert not any(word.startswith("axial") for word in drawn.words) and "10 pixels" in drawn.words
    write_montage(tmp_path / "a.png", np.zeros(shape), uniform(shape), None, None, (5, 1, 1), NO_WHEEL, "X-ray")
    assert "10 mm" in drawn.words


def test_the_scale_bar_is_as_long_as_it_says(tmp_path, drawn):
    shape = (20, 40, 50)
    write_montage(tmp_path / "a.png", np.zeros(shape), uniform(shape), None, None, (2, 2, 2), NO_WHEEL, "")
    length = next(float(word.split()[0]) for word in drawn.words if word.endswith(" mm"))
    left, down, width, _ = drawn.boxes[0]
    side = pixels(tmp_path / "a.png")[down + module.WHEEL + 60 :, left - 4 : left + width + 4]
    bar = (side > 200).all(-1).sum(1).max()
    assert bar == pytest.approx(length * drawn.coloured[0][2] / 100, abs=2)


def test_the_wheel_and_the_title_are_shown(tmp_path, drawn):
    wheel = np.zeros((50, 50, 4), np.uint8)
    wheel[..., 1], wheel[..., 3] = 255, 255
    shape = (6, 7, 8)
    title = "A Long Name of a CASE $x^{$ " * 20
    write_montage(tmp_path / "a.png", np.zeros(shape), uniform(shape), None, None, (1, 1, 1), wheel, title)
    picture = pixels(tmp_path / "a.png")
    assert pixel_in(picture, drawn.boxes[0], 0.5, 0.5) == [0, 255, 0]
    assert drawn.words[0].replace("\n", " ") == title.strip() and "\n" in drawn.words[0]
    assert "same colour =\nsame representation" in drawn.words
    # no text reaches the edges of the page
    assert (np.concatenate([picture[:, :8], picture[:, -8:]], 1) == picture[0, 0]).all()


def test_a_large_noisy_volume_gives_a_small_file(tmp_path):
    shape = (256, 256, 256)
    image = np.random.default_rng(0).normal(1, 0.1, shape).astype(np.float32)
    image *= smooth_colors(shape)[..., 0]
    mask = np.zeros(shape, np.uint8)
    mask[100:150, 80:160, 90:200] = 1
    write_montage(tmp_path / "a.png", image, smooth_colors(shape), None, mask, (1, 1, 1), NO_WHEEL, "large")
    assert (tmp_path / "a.png").stat().st_size < 1_000_000


def test_pictures_made_in_threads_are_those_made_alone(tmp_path):
    shape = (12, 30, 40)
    image = gaussian_filter(np.random.default_rng(0).normal(size=shape), 2)

    def draw(number: int) -> bytes:
        file = tmp_path / f"{number}.png"
        write_montage(file, image, smooth_colors(shape), None, None, (1, 1, 1), NO_WHEEL, "thread")
        return file.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(draw, range(8)))
    assert set(made) == {draw(8)}


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    shape = (4, 5, 6)
    image, colors = np.zeros(shape), uniform(shape)

    def draw(image=image, colors=colors, inside=None, mask=None, spacing=(1.0, 1.0, 1.0)):
        write_montage(tmp_path / "a.png", image, colors, inside, mask, spacing, NO_WHEEL, "")

    for wrong in ({"image": image[0]}, {"colors": colors[:2]}, {"inside": np.zeros((4, 5), bool)},
                  {"mask": np.zeros((4, 5, 7), int)}, {"image": image[:0], "colors": colors[:0]}):
        with pytest.raises(ValueError, match=r"expected arrays \(Z, Y, X\)"):
            draw(**wrong)
    for spacing in ((1.0, 1.0), (1.0, 0.0, 1.0)):
        with pytest.raises(ValueError, match="three positive lengths"):
            draw(spacing=spacing)
    assert not any(tmp_path.iterdir())


def test_a_real_image_is_shown_with_its_labels_and_the_names_of_its_edges(tmp_path, drawn, real_images):
    folder = real_images / "Dataset004_Hippocampus"
    file = sorted((folder / "labelsTr").glob("*.nii.gz"))[0]
    image = sitk.ReadImage(folder / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
    array, mask = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(sitk.ReadImage(file))
    geometry = Geometry.of_sitk(image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    write_montage(tmp_path / "a.png", array, smooth_colors(array.shape), None, mask, image.GetSpacing()[::-1], NO_WHEEL,
                  "hippocampus", geometry=geometry, labels={1: "anterior", 2: "posterior"})
    assert {"anterior", "posterior", "R", "L", "A", "P", "S"} <= set(drawn.words)
    assert len(drawn.coloured) == 9 and (tmp_path / "a.png").stat().st_size < 1_000_000
