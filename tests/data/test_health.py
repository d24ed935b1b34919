"""What is said of tomograms and picks, against searches and volumes whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from kaggle_utils.data.health import measure_intensities, measure_places, measure_spectrum
from kaggle_utils.data.phantom import tilt_coverage
from kaggle_utils.data.picks import make_picks
from kaggle_utils.data.tomograms import find_runs, find_tomograms, load_tomogram


def test_every_tomogram_has_its_size_and_percentiles(phantom_data):
    table = measure_intensities(phantom_data)
    runs = find_runs(phantom_data)
    assert list(table.index) == [(run, kind) for run in runs for kind in find_tomograms(run, phantom_data)]
    one = load_tomogram(runs[0], phantom_data)
    row = table.loc[runs[0], "denoised"]
    np.testing.assert_allclose(row[[*"zyx"]], np.array(one.volume.shape) * one.voxel_spacing)
    np.testing.assert_allclose(row[[25, 50, 75]], np.percentile(one.volume, [25, 50, 75]), atol=0.02 * one.volume.std())


def test_a_broken_tomogram_is_left_out_and_told(phantom_data, monkeypatch):
    kinds, run = find_tomograms(find_runs(phantom_data)[0], phantom_data), find_runs(phantom_data)[0]

    def load(name, data, split, kind):
        if (name, kind) == (run, kinds[0]):
            raise ValueError("no chunks")
        return load_tomogram(name, data, split, kind)

    monkeypatch.setattr("kaggle_utils.data.health.load_tomogram", load)
    with pytest.warns(UserWarning, match=f"run {run}: {kinds[0]} is left out: no chunks"):
        assert (run, kinds[0]) not in measure_intensities(phantom_data).index


def test_neighbours_and_faces_are_those_of_a_search_over_all_pairs():
    rng = np.random.default_rng(0)
    names = ["ribosome", "apo-ferritin"]
    points = pd.concat(
        [make_picks(run, rng.choice(names, 20), rng.uniform(0, 500, (20, 3))) for run in "ab"]
        + [make_picks("c", ["ribosome"], [[10, 20, 600]])]
    )
    sizes = pd.DataFrame({"x": 500.0, "y": 500.0, "z": 400.0}, index=pd.Index(["a", "b"], name="experiment"))
    table = measure_places(points, sizes)
    for i, (_, row) in enumerate(table.iterrows()):
        others = table.iloc[np.arange(len(table)) != i]
        others = others[others["experiment"] == row["experiment"]]
        gaps = np.linalg.norm(others[[*"xyz"]].to_numpy() - row[[*"xyz"]].to_numpy(float), axis=1)
        same = gaps[(others["particle_type"] == row["particle_type"]).to_numpy()]
        assert row["neighbour"] == pytest.approx(same.min(initial=np.inf))
        if row["experiment"] != "c":
            ends = (500 - row["x"], 500 - row["y"], 400 - row["z"])
            assert row["face"] == pytest.approx(min(row["x"], row["y"], row["z"], *ends))
    assert np.isnan(table["face"].iloc[-1])


def test_the_missing_wedge_is_about_kz_and_shows_in_the_radial_power():
    size, spacing = 48, 20.0
    kz, _, kx = np.meshgrid(*[np.fft.fftfreq(size)] * 3, indexing="ij")
    noise = np.random.default_rng(1).normal(size=(size,) * 3)
    volume = np.fft.ifftn(np.fft.fftn(noise) * tilt_coverage(kz, kx)).real
    spectrum = measure_spectrum(volume, spacing)
    assert spectrum.nyquist == 0.25  # half a wave per 2 nm
    assert (
        spectrum.power[2, size // 2] < spectrum.power[size // 2, 2] / 10
    )  # rows are kz, columns kx, zero in the middle
    radial = spectrum.radial[4:]
    assert (radial["missing"] < radial["measured"] / 10).all()
    white = measure_spectrum(noise, spacing).radial[4:]
    assert (white["missing"] / white["measured"]).mean() == pytest.approx(1, abs=0.1)


def test_neither_a_ramp_nor_a_level_gives_power_where_there_is_none():
    """Faces that do not meet would give a cross, and a mean a bright middle that its window spreads."""
    size = 48
    ramp = np.broadcast_to(np.arange(size) / size, (size,) * 3)
    power = measure_spectrum(ramp + 100, 20.0).power
    middle = size // 2
    assert power[middle, middle + 8 :].max() < 1e-4 * power[middle].max()  # without a window, a hundredth
    np.testing.assert_allclose(power, measure_spectrum(ramp, 20.0).power, atol=1e-6 * power.max())
