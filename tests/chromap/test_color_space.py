"""Colour spaces: closed forms, invariances, files, odd data."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from nnunet_cfcl.chromap import color_space
from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.errors import UserError

CLUSTERS, EACH = 3, 200


def blobs(seed=0, channels=32):
    """(600, 32) float32: three Gaussian clusters one after the other, on features of different size and offset."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(CLUSTERS, channels)) * 2
    cloud = np.repeat(centres, EACH, 0) + rng.normal(size=(CLUSTERS * EACH, channels))
    return (cloud * np.geomspace(0.01, 100, channels) + np.linspace(-5, 5, channels)).astype(np.float32)


def small(features, **settings):
    return ColorSpace.fit(features, 0, landmarks=120, components=6, **settings)


@pytest.fixture(scope="module")
def umap_space():
    return small(blobs(), identity="abc")


@pytest.fixture(scope="module")
def pca_space():
    return small(blobs(), reducer="pca", palette="oklch")


@pytest.fixture(params=["umap", "pca"])
def space(request):
    return request.getfixturevalue(f"{request.param}_space")


def disc(space, features):
    return space.place(space.reduce(torch.as_tensor(features).T)).T.numpy()


def difference(first, second):
    return np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max()


def test_the_space_has_the_sizes_that_were_asked_for(umap_space, pca_space):
    assert (umap_space.features, umap_space.components, len(umap_space.landmarks)) == (32, 6, 120)
    assert (pca_space.features, pca_space.components, len(pca_space.landmarks)) == (32, 2, 0)
    assert (umap_space.reducer, pca_space.reducer, umap_space.identity) == ("umap", "pca", "abc")
    assert umap_space.fallback == pca_space.fallback == ""


def test_the_same_seed_gives_the_same_space(umap_space):
    again = small(blobs(), identity="abc")
    for name in ("weight", "bias", "landmarks", "positions"):
        assert torch.equal(getattr(again, name), getattr(umap_space, name))


def test_clusters_get_places_of_their_own_that_k_means_finds_again_on_other_samples(space):
    places = disc(space, blobs(seed=1))
    assert np.linalg.norm(places, axis=1).max() <= 1 + 1e-6
    _, found = kmeans2(places.astype(float), CLUSTERS, minit="++", rng=np.random.default_rng(0))
    labels = found.reshape(CLUSTERS, EACH)
    assert (labels == labels[:, :1]).mean() > 0.99 and len(set(labels[:, 0].tolist())) == CLUSTERS
    colours = np.median(space.transform(blobs(seed=1)).reshape(CLUSTERS, EACH, 3).astype(int), axis=1)
    assert min(np.abs(colours[a] - colours[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 60


def test_reduce_place_and_color_are_transform_for_any_shape_and_type(space):
    features = torch.from_numpy(blobs(seed=2))
    expected = space.transform(features)
    assert expected.dtype == torch.uint8 and expected.shape == (600, 3)
    assert np.array_equal(space.transform(features.numpy()), expected.numpy())
    volume = features.T.contiguous().view(32, 10, 6, 10)
    reduced = space.reduce(volume)
    assert reduced.shape == (space.components, 10, 6, 10) and reduced.dtype == torch.float32
    coordinates = space.place(reduced)
    assert coordinates.shape == (2, 10, 6, 10)
    found = space.color(coordinates)
    assert found.shape == (10, 6, 10, 3) and difference(found.view(-1, 3), expected) <= 1
    torch.testing.assert_close(space.reduce(volume[:, ::2, :, 3]), reduced[:, ::2, :, 3])


def test_in_half_precision_reduced_features_keep_their_type_and_are_rounded_once(space, monkeypatch):
    monkeypatch.setattr(color_space, "BLOCK", 32 * 100)
    features = (torch.from_numpy(blobs(seed=2)).T / 50).half()
    reduced = space.reduce(features)
    assert reduced.dtype == torch.float16
    torch.testing.assert_close(reduced, space.reduce(features.float()).half())
    assert space.place(reduced).dtype == torch.float32
    huge = replace(space, weight=space.weight * 1e6)
    assert huge.reduce(features).isfinite().all()


def test_a_network_s_autocast_does_not_round_the_reduction(space):
    features = torch.from_numpy(blobs()).T
    expected = space.place(space.reduce(features))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(space.place(space.reduce(features)), expected)


def test_features_that_are_not_finite_still_get_a_place(space):
    features = torch.from_numpy(blobs()).T[:, :4].clone()
    features[0, 0], features[1, 1], features[:, 2] = np.nan, np.inf, -np.inf
    places = space.place(space.reduce(features))
    assert places.isfinite().all() and torch.linalg.vector_norm(places, dim=0).max() <= 1 + 1e-6


def test_pca_is_the_standardised_plane_of_largest_variance_mapped_to_the_disc():
    # an even ellipse in a plane of 5 features: its own enclosing ellipse is itself
    angles = np.arange(400) * 2 * np.pi / 400
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 2)))[0].T
    features = circle * (3, 1) @ axes * (1, 10, 0.1, 5, 2) + 7
    places = disc(small(features, reducer="pca", coverage=1.0), features.astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), 1, atol=1e-4)
    standard = (features - features.mean(0)) / features.std(0)
    components = standard @ np.linalg.svd(standard, full_matrices=False)[2][:2].T
    # an affine map of the first two components
    columns = np.column_stack([components, np.ones(len(components))])
    residual = places - columns @ np.linalg.lstsq(columns, places, rcond=None)[0]
    assert np.abs(residual).max() < 1e-4
    # not turned: what is far along the first component is far to the right, or to the left
    cross = components.T @ places
    assert np.abs(np.diag(cross)).min() > 20 * np.abs(cross[[0, 1], [1, 0]]).max()


def test_pca_colours_depend_on_neither_scale_offset_sign_nor_order(pca_space):
    features = blobs()
    rng = np.random.default_rng(3)
    factors, shifts = rng.uniform(0.3, 3, 32) * rng.choice([-1, 1], 32), rng.normal(size=32)
    other = (features * factors + shifts).astype(np.float32)
    expected = pca_space.transform(features)
    assert difference(small(other, reducer="pca", palette="oklch").transform(other), expected) <= 1
    shuffled = small(rng.permutation(features), reducer="pca", palette="oklch")
    assert difference(shuffled.transform(features), expected) <= 1


def test_umap_colours_do_not_depend_on_the_scale_of_features(umap_space):
    # powers of two: anything else is rounded, and UMAP's descent makes much of a last digit
    factors = 2.0 ** np.random.default_rng(3).integers(-4, 5, 32)
    other = (blobs() * factors).astype(np.float32)
    assert np.array_equal(small(other).transform(other), umap_space.transform(blobs()))


def test_umap_colours_of_the_same_data_in_another_order_are_nearly_the_same(umap_space):
    features = blobs()
    shuffled = small(np.random.default_rng(3).permutation(features))
    distances = np.linalg.norm(disc(shuffled, features) - disc(umap_space, features), axis=1)
    assert np.median(distances) < 0.3


def test_what_lies_outside_of_the_ellipse_gets_the_rim():
    features = np.concatenate([blobs(), 50 * blobs(seed=5)[:3]])
    places = disc(small(features, reducer="pca", coverage=0.9), features)
    radii = np.linalg.norm(places, axis=1)
    assert radii.max() <= 1 + 1e-6 and 0.05 < (radii > 1 - 1e-5).mean() <= 0.1 + 0.01


def test_a_saved_space_is_the_same_when_loaded(space, tmp_path):
    file = tmp_path / "space.npz"
    space.save(file)
    assert [one.name for one in tmp_path.iterdir()] == ["space.npz"]
    found = ColorSpace.load(file)
    for name in ("weight", "bias", "landmarks", "positions"):
        assert torch.equal(getattr(found, name), getattr(space, name))
    for name in ("reducer", "palette", "neighbours", "identity", "fallback"):
        assert getattr(found, name) == getattr(space, name) and type(getattr(found, name)) is type(getattr(space, name))
    assert np.array_equal(found.transform(blobs()), space.transform(blobs()))
    with np.load(file, allow_pickle=False) as stored:
        assert int(stored["format"]) == 1


def rewritten(file, **changes):
    with np.load(file) as stored:
        content = {**stored, **changes}
    written(file, np.savez, **{name: values for name, values in content.items() if values is not None})


def written(file, save, *arrays, **named):
    with open(file, "wb") as handle:
        save(handle, *arrays, **named)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda file: file.write_bytes(file.read_bytes()[:1000]), "cannot be read as a colour space"),
    (lambda file: file.write_bytes(b""), "cannot be read as a colour space"),
    (lambda file: file.write_text("hello"), "cannot be read as a colour space"),
    (lambda file: written(file, np.save, np.zeros(3)), "cannot be read as a colour space"),
    (lambda file: file.unlink(), "there is no colour space"),
    (lambda file: (file.unlink(), file.mkdir()), "cannot be read as a colour space"),
    (lambda file: rewritten(file, format=np.array(99)), "format 99, this version of nnunet_cfcl reads up to 1"),
    (lambda file: rewritten(file, weight=None), "cannot be read as a colour space"),
    (lambda file: rewritten(file, bias=np.zeros(3)), "expected shapes"),
    (lambda file: rewritten(file, weight=np.full((2, 32), np.nan)), "not finite"),
    (lambda file: rewritten(file, reducer=np.array("tsne")), "unknown reducer 'tsne'"),
    (lambda file: rewritten(file, weight=np.array([{}], dtype=object)), "cannot be read as a colour space"),
])
def test_a_file_that_is_no_colour_space_is_told(pca_space, tmp_path, spoil, message):
    file = tmp_path / "space.npz"
    pca_space.save(file)
    spoil(file)
    with pytest.raises(UserError, match=message):
        ColorSpace.load(file)


def test_every_damaged_byte_is_noticed_or_harmless(pca_space, tmp_path):
    file = tmp_path / "space.npz"
    pca_space.save(file)
    content = file.read_bytes()
    for place in range(0, len(content), 37):
        file.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1:])
        try:
            ColorSpace.load(file)
        except UserError as error:
            assert "cannot be read" in str(error) or "format" in str(error)


def test_features_of_another_network_are_told(space):
    with pytest.raises(UserError, match="of another model: found 31 features, expected 32"):
        space.transform(blobs()[:, 1:])
    with pytest.raises(UserError, match="found 600 features, expected 32"):
        space.reduce(torch.from_numpy(blobs()))
    with pytest.raises(ValueError, match="reduced features"):
        space.place(torch.zeros(32, 5))


def test_features_that_are_not_finite_are_counted():
    features = blobs()
    features[3, 1], features[3, 2], features[8, 0] = np.nan, np.nan, np.inf
    with pytest.raises(UserError, match="2 of 600 samples"):
        small(features)


@pytest.mark.parametrize("wrong", [
    {"components": 1}, {"landmarks": 0}, {"coverage": 0.0}, {"coverage": 1.1}, {"reducer": "tsne"}, {"palette": "jet"}])
def test_settings_out_of_range_are_told(wrong):
    with pytest.raises(ValueError, match="expected components|unknown reducer"):
        ColorSpace.fit(blobs(), **{"reducer": "pca", **wrong})


@pytest.mark.parametrize("shape", [(0, 32), (5, 0), (32,), (2, 3, 4)])
def test_features_of_another_shape_are_told(shape):
    with pytest.raises(ValueError, match="expected features"):
        ColorSpace.fit(np.zeros(shape))


@pytest.mark.parametrize("reducer", ["umap", "pca"])
@pytest.mark.parametrize("features", [np.full((50, 32), 3.3e5), blobs()[:1], np.zeros((2, 32))])
def test_samples_that_are_all_alike_are_at_the_centre(features, reducer):
    space = small(features, reducer=reducer)
    assert space.reducer == "pca" and space.fallback == "all samples are alike"
    assert (space.transform(blobs()) == 255).all()


@pytest.mark.parametrize(("count", "reason"), [(2, "found 2"), (3, "found 3"), (15, "found 15")])
def test_samples_too_few_for_umap_are_placed_by_their_components(count, reason):
    features = blobs()[::600 // count][:count]
    space = small(features)
    assert space.reducer == "pca" and reason in space.fallback
    assert len(np.unique(space.transform(features), axis=0)) == count


def test_a_few_samples_that_repeat_are_placed_by_their_components():
    space = small(np.repeat(blobs()[::100], 40, 0))
    assert space.reducer == "pca" and "found 6" in space.fallback


@pytest.mark.parametrize("count", [16, 30])
def test_a_few_samples_more_are_placed_by_umap(count):
    space = small(blobs()[::600 // count][:count])
    assert space.reducer == "umap" and space.fallback == "" and len(space.landmarks) == count


def test_samples_on_a_line_get_a_line_through_the_centre():
    line = np.linspace(-1, 1, 101)[:, None] * np.random.default_rng(0).normal(size=32)
    space = small(line)
    assert space.reducer == "pca" and "on a line" in space.fallback
    places = disc(space, line.astype(np.float32))
    np.testing.assert_allclose(np.abs(places[:, 0]), np.abs(np.linspace(-1, 1, 101)), atol=0.02)
    assert np.abs(places[:, 1]).max() < 1e-3


def test_constant_features_say_nothing():
    features = blobs()
    features[:, 4], features[:, 9] = 0, 1e6
    space = small(features, reducer="pca")
    assert not space.weight[:, [4, 9]].any() and space.weight.isfinite().all()
    other = features.copy()
    other[:, 9] += 1000
    assert np.array_equal(space.transform(other), space.transform(features))


def test_only_fitting_imports_umap():
    check = "import sys, nnunet_cfcl.chromap.color_space; sys.exit('umap' in sys.modules or 'numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_moving_to_a_device_keeps_everything(umap_space):
    moved = umap_space.to("meta")
    assert moved.device.type == "meta" and moved.identity == "abc" and moved.positions.device.type == "meta"
    assert umap_space.device.type == "cpu"
