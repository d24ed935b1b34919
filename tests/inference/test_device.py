"""What a device holds of a tomogram: its volume comes once, and memory that runs out is told, or done without."""

from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from networks import enliven
from torch.utils._python_dispatch import TorchDispatchMode

from kaggle_utils.inference import device as module
from kaggle_utils.inference import merging
from kaggle_utils.inference.device import DeviceVolume, make_sum
from kaggle_utils.inference.merging import Merger, find_by_committee, make_committee
from kaggle_utils.inference.predictor import Predictor
from kaggle_utils.models.folder import TrainedModel, build_model
from kaggle_utils.particles import PARTICLES

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (20, 36, 70)


def make_volume(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def make_model(architecture: str) -> TrainedModel:
    config = {
        "particles": list(PARTICLES.names),
        "window": 32 if architecture == "vnet" else None,
        "halo": 4,
        "merge": "logits",
        "decoder": "peaks",
        "views": 2,
        "radius_fraction": 0.5,
        "picks": dict.fromkeys(PARTICLES.names, 10),
        "scores": {"validation": {name: {"recall": 0.5} for name in PARTICLES.names}},
    }
    network = enliven(build_model(architecture, 2, particles=len(PARTICLES.names), stem=True))
    return TrainedModel(architecture, network, config, dict.fromkeys(PARTICLES.names, 0.5))


class Casts(TorchDispatchMode):
    """Counts the copies of at least a volume's size into another precision or onto another device."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):  # the first in inference mode
            before = args[0]
            self.count += output.numel() >= self.size and (before.dtype, before.device) != (output.dtype, output.device)
        return output


def test_a_volume_is_uploaded_once_for_all_networks_and_views():
    """Half precision is here what another device is elsewhere: all that a network reads has to be copied there."""
    committee = make_committee("both", [make_model("unet"), make_model("vnet")])
    predictors = [Predictor(model, views=2) for model in committee.models]
    for predictor in predictors:
        predictor.use(torch.float16)
    volume = make_volume()
    with Casts(volume.size) as casts:
        find_by_committee(volume, 10.0, committee, predictors, "TS_1")
    assert casts.count == 1
    with Casts(volume.size) as casts:
        for predictor in predictors:
            predictor.predict_logits(volume)
    assert casts.count == 2  # the count notices


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_beyond_its_ends_a_volumes_last_voxels_are_repeated(precision):
    volume = make_volume((8, 16, 24))
    loaded = DeviceVolume(volume, "cpu")
    padded = np.pad(volume, [(0, 8)] * 3, mode="edge").astype(str(precision).removeprefix("torch."))
    for low, high in ((0, 0, 0), (16, 24, 32)), ((1, 2, 3), (8, 16, 24)), ((5, 15, 20), (9, 17, 31)):
        box = tuple(map(slice, low, high))
        np.testing.assert_array_equal(loaded.cut(box, precision).numpy(), padded[box])
    assert loaded.get(torch.float32).data_ptr() == volume.ctypes.data  # on the host there is nothing to upload


# ---- memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.91 GiB")


def test_sums_that_a_device_has_no_room_for_are_kept_on_the_host(monkeypatch):
    zeros = torch.zeros

    def scarce(*shape, device):
        if device == "cuda":
            raise FULL
        return zeros(*shape, device=device)

    monkeypatch.setattr(torch, "zeros", scarce)
    with pytest.warns(
        UserWarning, match=r"cuda has too little memory for 7 sums of \(20, 36, 70\) voxels; they are kept"
    ):
        total = make_sum(7, SHAPE, "cuda")
    assert total.device.type == "cpu" and total.shape == (7, *SHAPE) and not total.any()


def test_what_does_not_fit_anywhere_is_told_with_its_size(monkeypatch):
    def fail(*arguments, **settings):
        raise OSError(12, "Cannot allocate memory")

    def fail_to_copy(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(module.mmap, "mmap", fail)
    with pytest.raises(MemoryError, match=r"cpu has too little memory for 7 sums of \(20, 36, 70\) voxels"):
        make_sum(7, SHAPE, "cpu")
    loaded = DeviceVolume(make_volume(), "cpu")
    monkeypatch.setattr(torch, "from_numpy", lambda array: Mock(to=fail_to_copy))
    with pytest.raises(MemoryError, match=r"cpu has too little memory for a volume of \(20, 36, 70\) voxels"):
        loaded.get(torch.float16)


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch, "from_numpy", lambda array: Mock(to=fail))
    with pytest.raises(RuntimeError, match="device-side"):
        make_sum(7, SHAPE, "cuda")
    with pytest.raises(RuntimeError, match="device-side"):
        DeviceVolume(make_volume(), "cpu").get(torch.float16)


def test_maps_that_a_device_has_no_room_to_decode_are_decoded_on_the_host(monkeypatch):
    on_host, there = torch.zeros(6, 4, 4, 4), Mock(device=torch.device("cuda"))
    there.cpu.return_value = on_host

    def decode(maps, *arguments, **_):
        if maps is there:
            raise FULL
        return pd.DataFrame({"decoded": [maps is on_host]})

    monkeypatch.setattr(merging, "find_candidates", decode)
    merger = Merger(make_committee("one", [make_model("unet")]), 10.0, "TS_1")
    assert merger.decode(there, "peaks")["decoded"].all()
