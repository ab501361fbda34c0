"""The picture of counterfactuals: what is in which panel, with which scale."""

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nnunet_cfcl.counterfactual.gate import contact_sheet as module
from nnunet_cfcl.counterfactual.gate.contact_sheet import (
    Sheet,
    contact_sheet,
    most_changed_channel,
    sheet_of,
    slice_with_most_contrast,
)
from tests.counterfactual.gate.drawn_figures import keep_figures
from tests.counterfactual.phantom_generators import INTERVENTIONS, TrueCounterfactuals, phantoms, scale_of


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn since."""
    return keep_figures(monkeypatch, module)


def sheet(shape: tuple[int, ...] = (20, 30), count: int = 3, channels: int = 1, reconstructed: bool = True) -> Sheet:
    random = torch.Generator().manual_seed(0)
    images = torch.randn((count, channels, *shape), generator=random)
    made = {"site": images + 2, "site+sex": images - 1}
    captions = {"site": ("site B",) * count, "site+sex": ("site B\nsex F",) * count}
    titles = tuple(f"case {n}" for n in range(count))
    return Sheet(images, titles, made, captions, 0.5 * images if reconstructed else None)


def test_a_row_has_original_reconstruction_and_a_pair_per_intervention(tmp_path, figures):
    shown = sheet()
    contact_sheet(shown, (1, 1), tmp_path / "sheet.png", "Title")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figures[0].axes if axes.images]
    assert len(panels) == 3 * 6
    for n in range(3):
        row = [np.asarray(axes.images[0].get_array()) for axes in panels[6 * n : 6 * n + 6]]
        x = shown.originals[n, 0].numpy()
        wanted = (x, 0.5 * x, x + 2, np.full_like(x, 2), x - 1, np.full_like(x, -1))
        for found, expected in zip(row, wanted, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [axes.get_title() for axes in panels[:6]] == ["", "", "to site B", "", "to site B, sex F", ""]
    words = [text.get_text() for text in figures[0].texts]
    assert words.count("difference") == 2
    assert {"Title", "original", "reconstruction", "site", "site+sex", "case 2"} <= set(words)


def test_grey_windows_are_shared_by_a_row_and_colours_by_all_differences(tmp_path, figures):
    shown = sheet()
    contact_sheet(shown, (1, 1), tmp_path / "sheet.png")
    panels = [axes.images[0] for axes in figures[0].axes if axes.images]
    for n in range(3):
        grey = {image.get_clim() for image in panels[6 * n : 6 * n + 6] if image.get_cmap().name == "gray"}
        x = shown.originals[n, 0]
        everything = torch.cat([part.flatten() for part in (x, 0.5 * x, x + 2, x - 1)])
        assert grey == {tuple(np.quantile(everything.numpy(), [0.005, 0.995]).tolist())}
    colours = {image.get_clim() for image in panels if image.get_cmap().name == "RdBu_r"}
    assert colours == {(-2.0, 2.0)}


def test_a_volume_is_shown_by_the_same_slice_in_all_panels_and_pixels_have_their_size(tmp_path, figures):
    shown = sheet((8, 10, 12), 1)
    shown.originals[:, :, 3] *= 5
    contact_sheet(shown, (4.0, 3.0, 1.5), tmp_path / "sheet.png")
    panels = [axes for axes in figures[0].axes if axes.images]
    np.testing.assert_allclose(panels[0].images[0].get_array(), shown.originals[0, 0, 3])
    np.testing.assert_allclose(panels[2].images[0].get_array(), shown.counterfactuals["site"][0, 0, 3])
    assert {axes.get_aspect() for axes in panels} == {2.0}
    box = panels[0].get_position()
    width, height = box.width * figures[0].get_size_inches()[0], box.height * figures[0].get_size_inches()[1]
    assert height / width == pytest.approx(10 * 3 / (12 * 1.5), rel=1e-3)


def test_the_slice_with_most_contrast_is_looked_for_in_the_middle_half():
    volume = torch.zeros(12, 4, 4)
    volume[1, 0, 0], volume[7, 0, 0], volume[4, 0, 0] = 100, 5, 1
    assert slice_with_most_contrast(volume) == 7
    assert slice_with_most_contrast(torch.zeros(1, 4, 4)) == 0 and slice_with_most_contrast(torch.zeros(4, 4)) is None


def test_of_several_channels_the_one_that_changes_most_is_shown_and_named(tmp_path, figures):
    shown = sheet(channels=3)
    shown.originals[:, 0] *= 100  # a change of 2 is little there
    for images in shown.counterfactuals.values():
        images[:, 0], images[:, 1] = shown.originals[:, 0] + 3, shown.originals[:, 1]
    assert most_changed_channel(shown) == 2
    contact_sheet(shown, (1, 1), tmp_path / "sheet.png", "Title")
    np.testing.assert_allclose(figures[0].axes[0].images[0].get_array(), shown.originals[0, 2])
    assert "Title (channel 2 of 0 to 2)" in [text.get_text() for text in figures[0].texts]


def test_reconstructions_and_interventions_may_be_missing(tmp_path, figures):
    contact_sheet(sheet(reconstructed=False), (1, 1), tmp_path / "a.png")
    assert len([axes for axes in figures[0].axes if axes.images]) == 3 * 5
    alone = sheet()
    contact_sheet(Sheet(alone.originals, alone.titles, {}, {}), (1, 1), tmp_path / "b.png")
    assert len(figures[1].axes) == 3


def test_long_names_are_broken_so_that_they_stay_beside_their_row(tmp_path, figures):
    flat = torch.zeros(1, 1, 8, 8)
    contact_sheet(Sheet(flat, ("a_name_of_a_case_that_is_long\nsite B",), {}, {}), (1, 1), tmp_path / "sheet.png")
    title = next(text for text in figures[0].texts if "site B" in text.get_text())
    assert title.get_text() == "a_name_of_a_case_th\nat_is_long\nsite B"
    right = title.get_window_extent().x1 / figures[0].dpi
    assert right < module.SIDE


def test_images_without_any_contrast_or_change_are_drawn(tmp_path):
    flat = torch.zeros(1, 1, 8, 8)
    words = r"site $\foo$"  # no mathematics
    contact_sheet(Sheet(flat, (words,), {words: flat}, {words: (words,)}, flat), (1, 1), tmp_path / "sheet.png")
    assert matplotlib.image.imread(tmp_path / "sheet.png").shape[0] > 100


def test_a_failure_while_drawing_keeps_the_old_figure(tmp_path, monkeypatch):
    file = tmp_path / "sheet.png"
    file.write_text("old")

    def fail(self, temporary, **_):
        temporary.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        contact_sheet(sheet(), (1, 1), file)
    assert file.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_shows_all_groups_with_reconstructions_and_counterfactuals():
    few = phantoms(12, test=True)
    generator = TrueCounterfactuals(few.every, scale_of(few.patches))
    found = sheet_of(generator, few.patches, INTERVENTIONS, 4, 0)
    assert list(found.counterfactuals) == ["scanner", "disease", "scanner+disease"] and len(found.titles) == 4
    groups = {title.split("\n", 1)[1] for title in found.titles}
    assert groups == {f"scanner {s}\ndisease {d}" for s in "AB" for d in ("no", "effusion")}
    for n, title in enumerate(found.titles):
        case, scanner, disease = title.split("\n")
        place = few.patches.cases.index(case)
        assert torch.equal(found.originals[n], few.patches.images[place])
        to = "B" if scanner.endswith("A") else "A"
        assert found.captions["scanner"][n] == f"scanner {to}"
        expected = few.every[to, disease.removeprefix("disease ")][place]
        assert torch.equal(found.counterfactuals["scanner"][n], expected)
    torch.testing.assert_close(found.reconstructions, 0.9 * found.originals)
