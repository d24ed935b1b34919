"""The phantom stands in for the competition's data: a fault here would teach every later step something wrong."""

import json
from itertools import combinations

import numpy as np
import pytest
import zarr
from scipy import ndimage, optimize

from kaggle_utils.data import phantom
from kaggle_utils.data.phantom import (
    contrast_transfer,
    draw_particles,
    electron_wavelength,
    image_specimen,
    is_phantom,
    particle_density,
    place_particles,
    write_phantom,
)
from kaggle_utils.data.picks import angstrom_to_voxel, read_overlay, read_run
from kaggle_utils.data.tomograms import TOMOGRAM_TYPES, find_runs, find_tomograms, load_tomogram, read_shape, read_zarr
from kaggle_utils.particles import PARTICLES

SMALL = (40, 64, 64)
DEFAULT = (64, 160, 160)
NAMES = list(PARTICLES.names)


def radius_of(name: str) -> float:
    return PARTICLES.get(name).radius / 10.012444196428572


def digest(folder) -> dict[str, bytes]:
    """Every file's bytes, but a tomogram's voxels: blosc's threads pack the same voxels in any order."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.json")}
    for path in folder.rglob("*.zarr"):
        group = zarr.open_group(str(path), mode="r")
        name = path.relative_to(folder).as_posix()
        found |= {name: group["0"][...].tobytes(), f"{name}/.zattrs": json.dumps(dict(group.attrs))}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom(folder, runs=2, test_runs=1, shape=SMALL, seed=3)
    return folder


@pytest.fixture(scope="module")
def imaged():
    """A specimen of the default size with its particles, and its four tomograms, which never touch the disk."""
    rng = np.random.default_rng(0)
    names, centres = place_particles(DEFAULT, rng)
    return names, centres, dict(image_specimen(draw_particles(DEFAULT, names, centres, rng), rng))


# ---- on disk


def test_it_reads_back_as_the_competition_does(data):
    assert is_phantom(data) and not (data / "phantom.partial.json").exists()
    assert json.loads((data / "phantom.json").read_text())["seed"] == 3
    assert find_runs(data) == ["TS_1_1", "TS_1_2"]
    assert find_runs(data, "test") == ["TS_101_1"]
    assert find_tomograms("TS_1_1", data) == list(TOMOGRAM_TYPES)
    assert find_tomograms("TS_101_1", data, "test") == ["denoised"]
    assert not (data / "test" / "overlay").exists()  # a test run's answers must not lie where a solution reads
    assert (data / "train/static/ExperimentRuns/TS_1_1/VoxelSpacing10.000/denoised.zarr").is_dir()
    assert (data / "train/overlay/ExperimentRuns/TS_1_1/Picks/apo-ferritin.json").is_file()


def test_spacing_is_the_competitions_to_the_last_digit(data):
    group = read_zarr("TS_1_1", data, kind="wbp")
    scale = group.attrs["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"]
    assert list(scale) == [10.012444196428572, 10.012444196428572, 10.012444537618887]
    assert read_shape("TS_1_1", data, kind="wbp") == SMALL


@pytest.mark.parametrize("kind", TOMOGRAM_TYPES)
def test_intensities_are_on_the_raw_scale(data, kind):
    volume = load_tomogram("TS_1_1", data, kind=kind).volume
    assert volume.dtype == np.float32
    assert abs(volume.mean()) < 1e-9
    assert volume.std() == pytest.approx(7e-6, rel=0.01)


def test_picks_are_where_the_particles_were_placed(data):
    """Coordinates go through files and back; place_particles with the run's own generator is the independent truth."""
    names, centres = place_particles(SMALL, np.random.default_rng([3, 0, 1]))
    picks = read_run("TS_1_2", data)
    assert sorted(picks["particle_type"]) == sorted(names)
    spacing = load_tomogram("TS_1_2", data).voxel_spacing
    for name in NAMES:
        read = angstrom_to_voxel(picks.loc[picks["particle_type"] == name, ["x", "y", "z"]], spacing)
        placed = centres[[other == name for other in names]]
        np.testing.assert_allclose(sorted(map(tuple, read)), sorted(map(tuple, placed)), atol=1e-9)


def test_truth_of_the_test_runs_holds_every_type(data):
    truth = read_overlay(data / "test_truth" / "overlay" / "ExperimentRuns")
    assert set(truth["experiment"]) == {"TS_101_1"}
    assert set(truth["particle_type"]) == set(NAMES)


def test_same_seed_same_data_whatever_the_number_of_runs(data, tmp_path):
    write_phantom(tmp_path / "again", runs=1, test_runs=1, shape=SMALL, seed=3)
    first, again = digest(data), digest(tmp_path / "again")
    shared = [path for path in again if path != "phantom.json"]
    assert len(shared) == 6 + 4 * 2 + 6 + 2
    assert [again[path] for path in shared] == [first[path] for path in shared]


def test_other_seeds_and_other_runs_differ(data, tmp_path):
    write_phantom(tmp_path, runs=1, test_runs=0, shape=SMALL, seed=4)
    volumes = [load_tomogram(run, data).volume for run in ("TS_1_1", "TS_1_2")]
    volumes += [load_tomogram("TS_101_1", data, "test").volume, load_tomogram("TS_1_1", tmp_path).volume]
    for one, other in combinations(volumes, 2):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2


def test_a_matching_phantom_is_kept(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    write_phantom(data, runs=2, test_runs=1, shape=SMALL, seed=3)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_phantom_of_other_settings_is_replaced_and_that_is_told(tmp_path, capsys):
    small = {"shape": (31, 32, 33)}
    write_phantom(tmp_path, runs=2, test_runs=1, **small)
    (tmp_path / "train" / ".DS_Store").touch()  # a Mac puts it into each folder that is looked at
    (tmp_path / "notes.txt").touch()
    assert capsys.readouterr().out == ""
    write_phantom(tmp_path, runs=1, test_runs=0, **small)
    assert capsys.readouterr().out == "replaces the phantom that was there (2 training and 1 test runs)\n"
    assert find_runs(tmp_path) == ["TS_1_1"] and not (tmp_path / "test_truth").exists()
    assert (tmp_path / "notes.txt").exists()  # beside the folders, nothing is in the way
    assert json.loads((tmp_path / "phantom.json").read_text())["runs"] == 1


def test_a_half_written_phantom_is_not_taken_for_one_and_is_replaced(tmp_path, monkeypatch):
    small = {"runs": 1, "test_runs": 0, "shape": (31, 32, 33)}

    def crash(path, *_):
        path.mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(phantom, "write_ome_zarr", crash)
        write_phantom(tmp_path, **small)
    group = tmp_path / "train/static/ExperimentRuns/TS_1_1/VoxelSpacing10.000/wbp.zarr"
    for name in ".zattrs.5c6e.partial", "0/.zarray", "0/0/0/0.5c6e.partial":  # as a killed process leaves them
        (group / name).parent.mkdir(parents=True, exist_ok=True)
        (group / name).touch()
    assert not is_phantom(tmp_path)
    write_phantom(tmp_path, **small)
    assert is_phantom(tmp_path) and len(read_run("TS_1_1", tmp_path)) == 1
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize("split", ["train", "test", "test_truth"])
def test_foreign_data_are_never_touched(tmp_path, split):
    real = tmp_path / split / "static" / "ExperimentRuns" / "TS_5_4" / "VoxelSpacing10.000" / "denoised.zarr" / "0"
    real.mkdir(parents=True)
    (real / "0").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="choose a new or an empty folder"):
        write_phantom(tmp_path, runs=1, test_runs=0, shape=SMALL)
    assert (real / "0").read_bytes() == b"precious" and not is_phantom(tmp_path)


def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path):
    """A typing error must not fill a home folder. Hidden files, as systems put them into new folders, do not count."""
    (tmp_path / "letters").mkdir()
    with pytest.raises(FileExistsError, match="letters is not part of a phantom"):
        write_phantom(tmp_path, runs=1, test_runs=0, shape=(31, 32, 33))
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").touch()
    assert is_phantom(write_phantom(tmp_path / "new", runs=1, test_runs=0, shape=(31, 32, 33)))


def test_a_real_run_put_into_a_phantom_is_not_deleted(tmp_path):
    write_phantom(tmp_path, runs=1, test_runs=0, shape=(31, 32, 33))
    real = tmp_path / "train" / "static" / "ExperimentRuns" / "TS_5_4"
    real.mkdir()
    with pytest.raises(FileExistsError, match="TS_5_4"):
        write_phantom(tmp_path, runs=2, test_runs=0, shape=(31, 32, 33))
    assert real.is_dir() and is_phantom(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "train/notes.txt",
        "train/.notes",
        "test/own/volume.mrc",
        "train/static/ExperimentRuns/TS_1_1/notes.txt",
        "train/static/ExperimentRuns/TS_1_1/VoxelSpacing10.000/my.zarr/0/.zarray",
        "train/static/ExperimentRuns/TS_1_1/VoxelSpacing10.000/wbp.zarr/labels/0",
        "train/overlay/ExperimentRuns/TS_1_1/Picks/me_1_ribosome.json",
        "train/overlay/ExperimentRuns/TS_1_1/Picks/membrane.json",
        "train/overlay/ExperimentRuns/TS_1_1/Segmentations/mask.zarr",
        "train/overlay/ExperimentRuns/TS_1_copy/Picks/ribosome.json",
        "test_truth/submission.csv",
    ],
)
def test_what_somebody_put_into_a_phantom_is_not_deleted(tmp_path, name):
    """Another seed, and all below the folders would be gone without a word."""
    write_phantom(tmp_path, runs=1, test_runs=0, shape=(31, 32, 33))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match="is not part of a phantom; move it away, or choose a new"):
        write_phantom(tmp_path, runs=1, test_runs=0, shape=(31, 32, 33), seed=1)
    assert (tmp_path / name).read_text() == "precious" and is_phantom(tmp_path) and find_runs(tmp_path) == ["TS_1_1"]


@pytest.mark.parametrize("shape", [(30, 64, 64), (64, 64, 20), (64, 64)])
def test_too_small_a_shape_is_a_clear_error_before_anything_is_written(tmp_path, shape):
    with pytest.raises(ValueError, match="cannot hold a ribosome"):
        write_phantom(tmp_path / "out", shape=shape)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((100_000, 100_000, 100_000), "has 1,000,000,000,000,000 voxels"),
        ((1000, 1000, 1000), "needs 37.3 GiB of memory, but 8.0 GiB"),
    ],
)
def test_a_shape_beyond_the_memory_is_refused_before_anything_is_written(tmp_path, monkeypatch, shape, message):
    """Otherwise the system kills the process, minutes later and without a message."""
    monkeypatch.setattr(phantom, "find_free_memory", lambda device: 2**33)
    with pytest.raises(ValueError, match=f"{message}.*; choose"):
        write_phantom(tmp_path / "new", shape=shape)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"test_runs": -1}, {"seed": -1}])
def test_impossible_settings_are_a_clear_error(tmp_path, wrong):
    with pytest.raises(ValueError, match="needed"):
        write_phantom(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


# ---- the specimen


@pytest.mark.parametrize("shape", [DEFAULT, SMALL, (33, 150, 97), (31, 300, 31)])
def test_spheres_lie_inside_and_never_touch(shape):
    for seed in range(5):
        names, centres = place_particles(shape, np.random.default_rng(seed))
        for name, centre in zip(names, centres, strict=True):
            assert (centre >= radius_of(name)).all() and (centre + radius_of(name) <= np.array(shape) - 1).all()
        for (one, a), (other, b) in combinations(zip(names, centres, strict=True), 2):
            assert np.sqrt(((a - b) ** 2).sum()) - radius_of(one) - radius_of(other) >= 2


def test_default_volumes_hold_several_of_each_and_differ_as_real_runs_do():
    counts, crowding = [], []
    for seed in range(20):
        names, _ = place_particles(DEFAULT, np.random.default_rng(seed))
        counts.append([names.count(name) for name in NAMES])
        crowding.append(sum(4 / 3 * np.pi * radius_of(name) ** 3 for name in names) / np.prod(DEFAULT))
    fewest, most = np.min(counts, axis=0), np.max(counts, axis=0)
    assert fewest.min() >= 3 and (most >= 1.8 * fewest).all() and (most <= 3.5 * fewest).all()
    assert 0.14 < np.mean(crowding) < 0.18 and max(crowding) < 0.25


def test_small_volumes_hold_every_type():
    for seed in range(10):
        assert set(place_particles(SMALL, np.random.default_rng(seed))[0]) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_particles_have_their_true_size_and_their_pick_in_the_middle(name):
    radius = PARTICLES.get(name).radius
    axis = np.arange(-1.3 * radius, 1.3 * radius + 1, radius / 25)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    density = particle_density(name, points)
    assert np.linalg.norm((density[..., None] * points).sum(axis=(0, 1, 2)) / density.sum()) < 1
    assert 0.9 * radius < np.linalg.norm(points[density > 0.5], axis=-1).max() < 1.01 * radius


def test_shapes_are_distinguishable():
    def moments(name):
        axis = np.arange(-160, 161, 5.0)
        points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        covariance = np.cov(points.T, aweights=particle_density(name, points))
        return np.sqrt(np.linalg.eigvalsh(covariance)[::-1])

    centre = {name: float(particle_density(name, np.zeros(3))) for name in NAMES}
    assert centre["apo-ferritin"] == centre["virus-like-particle"] == 0  # hollow
    assert centre["beta-amylase"] == centre["thyroglobulin"] == 1  # solid
    long, middle, _ = moments("thyroglobulin")
    assert long > 2 * middle
    long, _, short = moments("beta-amylase")
    assert long > 2 * short and long < 0.5 * moments("thyroglobulin")[0]
    # Four lobes: the corners of the tetramer are full and its middle is empty.
    assert centre["beta-galactosidase"] == 0
    assert (
        particle_density("beta-galactosidase", np.array([[a, b, 0] for a in (-42, 42) for b in (-32, 32)])) == 1
    ).all()
    # Two subunits: along the long axis the cross-section narrows between them.
    axis = np.arange(-150, 151, 5.0)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    sections = particle_density("ribosome", points).sum(axis=(1, 2))
    waist = sections[np.searchsorted(axis, 0) : np.searchsorted(axis, 100)].min()
    assert waist < 0.6 * min(sections[axis < 0].max(), sections[axis > 80].max())


@pytest.mark.parametrize("name", NAMES)
def test_particles_are_drawn_at_sub_voxel_positions(name):
    """The centre of mass of the drawn voxels must be the centre that is written to the picks: no half voxel lost."""
    centre = np.array([20.3, 24.75, 30.1])
    volume = draw_particles((48, 50, 56), [name], centre[None], np.random.default_rng(1))
    np.testing.assert_allclose(ndimage.center_of_mass(volume), centre, atol=0.1)


def test_orientations_are_random():
    draw = [
        draw_particles((40, 40, 40), ["thyroglobulin"], np.full((1, 3), 20.0), np.random.default_rng(i))
        for i in range(2)
    ]
    assert np.corrcoef(draw[0].ravel(), draw[1].ravel())[0, 1] < 0.9


# ---- the microscope


def test_wavelength_is_the_textbooks():
    """Williams and Carter 2009, Transmission Electron Microscopy, table 1.2: 3.70, 2.51 and 1.97 pm."""
    for voltage, picometres in ((100e3, 3.70), (200e3, 2.51), (300e3, 1.97)):
        assert electron_wavelength(voltage) * 100 == pytest.approx(picometres, abs=0.005)


@pytest.mark.parametrize("defocus", [1e4, 3e4, 5e4])
def test_first_zero_of_the_contrast_transfer(defocus):
    """Without spherical aberration and amplitude contrast it is at 1 / sqrt(wavelength x defocus), 14.03 A at 1 um."""

    def first_zero(**settings):
        low, high = 0.5 / defocus**0.5, 9 / defocus**0.5
        return optimize.brentq(lambda k: contrast_transfer(k, defocus, **settings), low, high)

    pure = first_zero(cs=0, amplitude=0)
    assert 1 / pure == pytest.approx(np.sqrt(0.0196875 * defocus), rel=1e-4)
    # Amplitude contrast moves it inwards, spherical aberration outwards.
    assert first_zero(cs=0) < pure < first_zero(amplitude=0)


def test_spherical_aberration_gives_the_textbooks_point_resolution():
    """Williams and Carter 2009, ch. 28: at Scherzer's defocus the first zero is near 0.66 (Cs wavelength^3)^(1/4)."""
    cs, wavelength = 2.7e7, 0.0196875  # Angstrom
    scherzer = 1.2 * np.sqrt(cs * wavelength)
    frequencies = np.linspace(0.01, 0.6, 100_000)
    values = contrast_transfer(frequencies, scherzer, amplitude=0)
    first = frequencies[np.flatnonzero(values > 0)[0]]
    assert 1 / first == pytest.approx(0.66 * cs**0.25 * wavelength**0.75, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_particles_are_dark_on_bright(imaged, name):
    names, centres, volumes = imaged
    volume = volumes["denoised"]
    z, y, x = np.ogrid[tuple(slice(size) for size in DEFAULT)]
    inside = [
        volume[(z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= radius_of(name) ** 2].mean()
        for other, centre in zip(names, centres, strict=True)
        if other == name
    ]
    assert np.mean(np.array(inside) < np.median(volume)) >= 0.9


def test_missing_wedge(imaged):
    """Beyond 60 degrees nothing is measured in wbp; isonetcorrected has something there, yet less than elsewhere."""
    _, _, volumes = imaged
    kz, _, kx = np.meshgrid(*(np.fft.fftfreq(size) for size in DEFAULT), indexing="ij")
    angle = np.degrees(np.arctan2(np.abs(kz), np.abs(kx)))
    band = (kz**2 + kx**2 > 0.1**2) & (kz**2 + kx**2 < 0.3**2)
    power = {kind: np.abs(np.fft.fftn(volume)) ** 2 for kind, volume in volumes.items()}
    ratio = {kind: p[band & (angle > 75)].mean() / p[band & (angle < 45)].mean() for kind, p in power.items()}
    assert ratio["wbp"] < 1e-6 and ratio["ctfdeconvolved"] < 1e-6 and ratio["denoised"] < 1e-6
    assert 1e-3 < ratio["isonetcorrected"] < 0.5


def test_types_differ_in_noise_as_the_real_ones_do(imaged):
    names, centres, volumes = imaged

    def roughness(volume):
        return np.diff(volume, axis=2).std() / volume.std()

    def contrast(volume):  # of the smallest dense particle against the noise
        nearest = [tuple(np.rint(c).astype(int)) for n, c in zip(names, centres, strict=True) if n == "beta-amylase"]
        return -np.mean([volume[index] for index in nearest]) / volume.std()

    order = ("wbp", "ctfdeconvolved", "isonetcorrected", "denoised")
    rough = [roughness(volumes[kind]) for kind in order]
    seen = [contrast(volumes[kind]) for kind in order]
    assert all(a > b for a, b in zip(rough, rough[1:], strict=False)), rough
    assert seen[0] < seen[1] < min(seen[2:]) and seen[-1] > 2, seen


@pytest.mark.parametrize("shape", [(31, 31, 31), (37, 41, 43), (32, 33, 90)])
def test_odd_shapes_come_out_as_asked(shape):
    rng = np.random.default_rng(0)
    names, centres = place_particles(shape, rng)
    assert "ribosome" in names
    for _, volume in image_specimen(draw_particles(shape, names, centres, rng), rng):
        assert volume.shape == shape and volume.dtype == np.float32 and np.isfinite(volume).all()


def test_levels_are_written(data):
    group = read_zarr("TS_1_1", data)
    assert isinstance(group, zarr.Group)
    assert [tuple(group[str(level)].shape) for level in range(3)] == [(40, 64, 64), (20, 32, 32), (10, 16, 16)]
