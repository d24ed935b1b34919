"""The networks are the report's, layer by layer; a model folder gives back what was trained, or says why it cannot."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kaggle_utils.models.config import read_config
from kaggle_utils.models.folder import (
    ARCHITECTURES,
    build_model,
    fold_norms,
    load_model,
    name_model,
    save_config,
    save_weights,
)
from kaggle_utils.models.vnet import ResidualBlock, normalise_groups
from kaggle_utils.models.weights import load_tensors, load_weights, save_tensors

# ---- the report's layers, written down once more from its text; the kit's code must agree

CONV = "conv {}-{} k3 s1 p1"
UNET = {  # section 4.2
    "enc1": [CONV.format(1, 32), "batch norm 32", "ReLU", CONV.format(32, 32), "batch norm 32", "ReLU"],
    "pool1": ["max-pool 2"],
    "enc2": [CONV.format(32, 64), "batch norm 64", "ReLU", CONV.format(64, 64), "batch norm 64", "ReLU"],
    "pool2": ["max-pool 2"],
    "bottleneck": [CONV.format(64, 128), "batch norm 128", "ReLU", CONV.format(128, 128), "batch norm 128", "ReLU"],
    "upconv2": ["up-conv 128-64 k2 s2"],
    "dec2": [CONV.format(128, 64), "batch norm 64", "ReLU", CONV.format(64, 64), "batch norm 64", "ReLU"],
    "upconv1": ["up-conv 64-32 k2 s2"],
    "dec1": [CONV.format(64, 32), "batch norm 32", "ReLU", CONV.format(32, 32), "batch norm 32", "ReLU"],
    "final": ["conv 32-1 k1 s1 p0"],
}
BASELINE = {  # section 4.1; the sigmoid is left to the loss and to inference
    "encoder": [CONV.format(1, 32), "ReLU", "max-pool 2"],
    "decoder": ["upsample 2", CONV.format(32, 1)],
}


def residual(inputs: int, outputs: int) -> list[str]:
    """A V-Net block: where the channels differ, the input needs a 1x1x1 convolution before it can be added."""
    half = [CONV.format(outputs, outputs), f"group norm {outputs}", "PReLU"]
    layers = [CONV.format(inputs, outputs), *half[1:], *half]
    return layers + ([] if inputs == outputs else [f"conv {inputs}-{outputs} k1 s1 p0"])


VNET = {  # section 5.1
    "enc1": residual(1, 8),
    "down1": ["conv 8-8 k2 s2 p0"],
    "enc2": residual(8, 16),
    "down2": ["conv 16-16 k2 s2 p0"],
    "enc3": residual(16, 32),
    "down3": ["conv 32-32 k2 s2 p0"],
    "bottleneck": residual(32, 64),
    "upconv3": ["up-conv 64-32 k2 s2"],
    "dec3": residual(32, 32),
    "upconv2": ["up-conv 32-16 k2 s2"],
    "dec2": residual(16, 16),
    "upconv1": ["up-conv 16-8 k2 s2"],
    "dec1": residual(8, 8),
    "final": ["conv 8-1 k1 s1 p0"],
}


def describe(layer: nn.Module) -> str | None:
    """Put a layer into the words of the tables above; None for a container."""
    if isinstance(layer, nn.ConvTranspose3d):
        return f"up-conv {layer.in_channels}-{layer.out_channels} k{same(layer.kernel_size)} s{same(layer.stride)}"
    if isinstance(layer, nn.Conv3d):
        size = f"k{same(layer.kernel_size)} s{same(layer.stride)} p{same(layer.padding)}"
        return f"conv {layer.in_channels}-{layer.out_channels} {size}"
    if isinstance(layer, nn.BatchNorm3d):
        return f"batch norm {layer.num_features}"
    if isinstance(layer, nn.GroupNorm):
        return f"group norm {layer.num_channels}"
    if isinstance(layer, nn.MaxPool3d):
        return f"max-pool {same(layer.kernel_size)}"
    if isinstance(layer, nn.Upsample):
        return f"upsample {same(layer.scale_factor):g}"
    if isinstance(layer, nn.ReLU | nn.PReLU):
        return type(layer).__name__
    assert isinstance(layer, nn.Sequential | ResidualBlock | nn.Identity), f"the report has no {layer}"


def same(values) -> float:
    """The one value of all three axes."""
    (value,) = set(values) if isinstance(values, tuple) else {values}
    return value


@pytest.mark.parametrize(
    ("architecture", "width", "table"), [("unet", 32, UNET), ("vnet", 8, VNET), ("baseline", 32, BASELINE)]
)
def test_layers_are_the_reports_to_the_letter(architecture, width, table):
    network = build_model(architecture, width)
    ours = {
        name: [words for layer in part.modules() if (words := describe(layer))]
        for name, part in network.named_children()
        if not isinstance(part, nn.Identity)  # which does nothing: where the competition recipe has a stem
    }
    assert ours == table
    assert list(ours) == list(table)


def test_parameters_are_as_many_as_the_layers_have_by_hand():
    def conv(inputs, outputs, edge=3):
        return inputs * outputs * edge**3 + outputs

    def double(inputs, outputs):  # two convolutions, each with a batch norm's scale and shift
        return conv(inputs, outputs) + conv(outputs, outputs) + 2 * 2 * outputs

    def block(inputs, outputs):  # each group norm has a scale and a shift, each PReLU a slope, for every channel
        shortcut = 0 if inputs == outputs else conv(inputs, outputs, 1)
        return conv(inputs, outputs) + conv(outputs, outputs) + 2 * (2 + 1) * outputs + shortcut

    ways = [(1, 32), (32, 64), (64, 128), (128, 64), (64, 32)]
    unet = sum(double(*way) for way in ways) + conv(128, 64, 2) + conv(64, 32, 2) + conv(32, 1, 1)
    ways = [(1, 8), (8, 16), (16, 32), (32, 64), (32, 32), (16, 16), (8, 8)]
    steps = [(8, 8), (16, 16), (32, 32), (64, 32), (32, 16), (16, 8)]
    vnet = sum(block(*way) for way in ways) + sum(conv(*step, 2) for step in steps) + conv(8, 1, 1)
    expected = {"unet": unet, "vnet": vnet, "baseline": conv(1, 32) + conv(32, 1)}

    assert expected == {"unet": 1_356_641, "vnet": 328_849, "baseline": 1_761}
    for architecture, width in ("unet", 32), ("vnet", 8), ("baseline", 32):
        network = build_model(architecture, width)
        assert sum(weights.numel() for weights in network.parameters()) == expected[architecture], architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cells", [(1, 1, 1), (3, 1, 2), (2, 5, 1)])
def test_output_has_the_inputs_shape(architecture, cells):
    network = build_model(architecture, 4).eval()
    shape = [network.divisor * cell for cell in cells]
    with torch.inference_mode():
        assert network(torch.randn(2, 1, *shape)).shape == (2, 1, *shape)


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize(("architecture", "divisor"), [("unet", 4), ("vnet", 8)])
def test_a_network_for_several_particles_has_a_channel_for_each_and_one_for_the_background(architecture, divisor, stem):
    network = build_model(architecture, 4, particles=6, stem=stem).eval()
    assert network.divisor == (2 * divisor if stem else divisor)
    shape = [network.divisor * cell for cell in (1, 3, 2)]
    with torch.inference_mode():
        volumes = torch.randn(2, 1, *shape)
        assert network(volumes).shape == (2, 7, *shape)
        trained = [edge // 2 if stem else edge for edge in shape]
        assert network.train()(volumes).shape == (2, 7, *trained)


@pytest.mark.parametrize(("architecture", "width"), [("unet", 32), ("vnet", 8)])
def test_a_stem_leaves_the_reports_layers_between_it_and_the_last(architecture, width):
    table = {"unet": UNET, "vnet": VNET}[architecture]
    network = build_model(architecture, width, stem=True)
    parts = {
        name: [words for layer in part.modules() if (words := describe(layer))]
        for name, part in network.named_children()
    }
    assert parts["stem"] == [f"conv 1-{width} k6 s2 p2"] and parts["final"] == [f"conv {width}-1 k1 s1 p0"]
    inside = [name for name in table if name not in ("enc1", "final")]
    assert list(parts) == ["stem", *table, "repeat"] and network.repeat.scale_factor == 2
    assert {name: parts[name] for name in inside} == {name: table[name] for name in inside}


def seen_by(network: nn.Module, volume: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each named layer while `network` looks at `volume`."""
    seen = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: (given[0].clone(), out.clone())})
        )
    with torch.inference_mode():
        network(volume)
    return seen


def test_the_unet_concatenates_its_skips():
    seen = seen_by(build_model("unet", 4).eval(), torch.randn(1, 1, 8, 8, 8))
    for decoder, up, encoder in ("dec2", "upconv2", "enc2"), ("dec1", "upconv1", "enc1"):
        assert torch.equal(seen[decoder][0], torch.cat([seen[up][1], seen[encoder][1]], dim=1)), decoder


def test_the_vnet_adds_its_skips():
    seen = seen_by(build_model("vnet", 4).eval(), torch.randn(1, 1, 8, 8, 8))
    for number in 1, 2, 3:
        assert torch.equal(seen[f"dec{number}"][0], seen[f"upconv{number}"][1] + seen[f"enc{number}"][1]), number


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (1, 8)])
def test_a_residual_block_adds_its_input_to_its_output(inputs, outputs):
    block, volume = ResidualBlock(inputs, outputs), torch.randn(1, inputs, 4, 4, 4)
    nn.init.zeros_(block.norm2.weight)  # the convolutions then say nothing, and only the input is left
    added = volume if inputs == outputs else block.shortcut(volume)
    torch.testing.assert_close(block(volume), torch.where(added > 0, added, 0.25 * added))  # PReLU begins at 0.25


def test_models_are_called_as_in_the_report():
    assert name_model("unet", "apo-ferritin") == "3d_unet_model_apo_ferritin"  # figure 6
    assert name_model("unet", "virus-like-particle") == "3D_UNET_MODEL_VIRUS_LIKE_PARTICLE".lower()  # table 1
    assert name_model("vnet", "ribosome") == "VNET_MODEL_RIBOSOME".lower()  # table 2


def test_an_unknown_architecture_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'resnet'; choose from baseline, unet, vnet"):
        build_model("resnet", 8)


# ---- the group norm of the GPU, which a CPU can compute too


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_group_norm_of_the_gpu_is_torchs_and_keeps_the_memory_format(dtype, mean):
    """Beside torch's in double precision, also far from 0: no more than the roundings of scale, shift and result."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8).double()
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias, -1, 1)
    weight, bias = norm.weight.detach(), norm.bias.detach()
    shifted = 2 * mean + 2 * torch.randn(2, 8, 16, 15, 17) * torch.tensor([1.0, 10.0])[:, None, None, None, None]
    x = shifted.to(dtype).to(memory_format=torch.channels_last_3d)
    before = x.clone()
    found = normalise_groups(x, weight.float(), bias.float(), 4, norm.eps)
    wanted = norm(x.double()).detach()

    size = wanted.abs() + bias[:, None, None, None].abs()
    statistics = torch.finfo(torch.float32).eps * (4 * size + 8 * mean * weight.max())
    half_a_step = torch.finfo(dtype).eps / 2
    error = found.double() - wanted
    assert (error.abs() <= half_a_step * (4 * size + 0.1) + statistics).all()
    assert (error.mean((0, 2, 3, 4)).abs() <= half_a_step * (bias.abs() + 0.5) + statistics.amax((0, 2, 3, 4))).all()
    assert found.dtype == dtype and found.stride() == x.stride() and torch.equal(x, before)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)


# ---- model folders


def config_of(architecture: str, width: int = 4) -> dict:
    return {"architecture": architecture, "width": width, "particle": "ribosome", "window": None, "halo": 24}


def save(folder, architecture: str = "unet", width: int = 4) -> nn.Module:
    torch.manual_seed(1)
    network = build_model(architecture, width)
    for weights in (*network.parameters(), *network.buffers()):  # batch norm's statistics must travel too
        if weights.is_floating_point():
            nn.init.uniform_(weights, 0.1, 0.2)
    save_weights(folder, network.state_dict())
    save_config(folder, config_of(architecture, width), {"ribosome": 0.25})
    return network.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_alone_rebuilds_its_model(architecture, tmp_path):
    network = save(tmp_path / "some_name", architecture)
    model = load_model(tmp_path / "some_name")

    volume = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        # Another memory format, and the norms folded into the weights: sums round otherwise.
        torch.testing.assert_close(model.network(volume), network(volume), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(layer, nn.BatchNorm3d) for layer in model.network.modules())
    assert isinstance(model.network, ARCHITECTURES[architecture]) and not model.network.training
    assert (model.name, model.particle, model.threshold) == ("some_name", "ribosome", 0.25)
    assert model.config == config_of(architecture)


@pytest.mark.parametrize("architecture", ["unet", "vnet"])
def test_a_folder_of_a_network_for_several_particles_rebuilds_it(architecture, tmp_path):
    torch.manual_seed(0)
    network, names = build_model(architecture, 4, particles=2, stem=True).eval(), ["ribosome", "beta-amylase"]
    config = {key: value for key, value in config_of(architecture).items() if key != "particle"}
    save_weights(tmp_path, network.state_dict())
    save_config(tmp_path, {**config, "particles": names, "stem": True}, {"ribosome": 0.25, "beta-amylase": 0.75})
    model, volume = load_model(tmp_path), torch.randn(1, 1, 16, 16, 16)
    assert model.particles == tuple(names)
    with torch.inference_mode():
        torch.testing.assert_close(model.network(volume), network(volume), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="finds ribosome, beta-amylase; give a model for one particle here"):
        _ = model.particle
    another = [*names, "thyroglobulin"]
    for wrong, message in [
        ({"stem": False}, "it (also has 'stem.bias'|lacks enc1.shortcut.weight)"),
        ({"particles": another}, "final.weight has the shape .*, not .*"),
    ]:
        save_config(tmp_path, {**config, "particles": names, "stem": True, **wrong}, dict.fromkeys(another, 0.5))
        with pytest.raises(
            ValueError, match=f"weights.safetensors is of another network: {message}; train the model again"
        ):
            load_model(tmp_path)
    save_config(tmp_path, {**config, "particles": names, "stem": True}, {"ribosome": 0.25})
    with pytest.raises(ValueError, match="thresholds.json has no 'beta-amylase'; train the model again"):
        load_model(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_norms_change_no_output(architecture):
    """Nor any layer that a V-Net or the baseline has."""
    torch.manual_seed(0)
    network = build_model(architecture, 4).eval()
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm3d)]
    for norm in norms:  # as built they do nothing
        for statistic, low, high in (norm.weight, 0.5, 2), (norm.bias, -1, 1), (norm.running_mean, -1, 1):
            nn.init.uniform_(statistic, low, high)
        nn.init.uniform_(norm.running_var, 0.2, 3)
    volume = torch.randn(1, 1, 16, 8, 24)
    with torch.inference_mode():
        before = network(volume.clone())
        assert fold_norms(network) is network
        after = network(volume.clone())
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.max() - before.min()))
    assert (len(norms) == 10) == (architecture == "unet")
    assert not any(isinstance(layer, nn.BatchNorm3d) for layer in network.modules())


def test_a_crash_while_saving_leaves_the_old_weights(tmp_path, monkeypatch):
    save(tmp_path)
    before = (tmp_path / "weights.safetensors").read_bytes()

    def crash(path, content):
        original(path, content[:9])
        raise OSError("disk full")

    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", crash)
    with pytest.raises(OSError, match="disk full"):
        save_weights(tmp_path, build_model("unet", 4).state_dict())
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "thresholds.json", "weights.safetensors"]


def test_the_same_weights_give_the_same_bytes(tmp_path):
    """So that two trainings can be compared by their files."""
    network = save(tmp_path / "model_a")
    save_weights(tmp_path / "model_b", network.state_dict())
    assert (tmp_path / "model_a" / "weights.safetensors").read_bytes() == (
        tmp_path / "model_b" / "weights.safetensors"
    ).read_bytes()


def test_weights_that_another_tool_wrote_are_read(tmp_path):
    """They have no checksum, but tensors of the right names, shapes and types."""
    network = save(tmp_path)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors", {"format": "pt"})
    found = load_weights(tmp_path / "weights.safetensors", network.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    assert load_tensors(tmp_path / "weights.safetensors")[1] is None


def test_tensors_of_every_kind_come_back_with_what_is_beside_them(tmp_path):
    tensors = {
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "truth": torch.tensor([True, False]),
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "turned": torch.arange(6).view(2, 3).T,
    }
    about = {"losses": [0.1, 1e-300, float("inf")], "näme": None, "big": 2**70}
    save_tensors(tmp_path / "file", tensors, about)
    found, beside = load_tensors(tmp_path / "file")
    assert beside == about and list(found) == sorted(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("change", ["nothing", "a number", "a name", "a type", "a shape", "what is beside"])
def test_the_checksum_is_of_the_content_and_not_of_how_it_is_laid_out(tmp_path, change):
    """Another version of safetensors may order and space a header otherwise."""
    path = tmp_path / "file"
    save_tensors(path, {"first": torch.arange(4.0), "second": torch.ones(4)}, {"epoch": 1})
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, numbers = dict(reversed(json.loads(content[8:end]).items())), bytearray(content[end:])
    if change == "a number":
        numbers[2] ^= 1
    elif change == "a name":
        header["third"] = header.pop("second")
    elif change == "a type":
        header["second"]["dtype"] = "I32"
    elif change == "a shape":
        header["second"]["shape"] = [2, 2]
    elif change == "what is beside":
        beside = header["__metadata__"]["kaggle_utils"]
        header["__metadata__"]["kaggle_utils"] = beside.replace('"epoch": 1', '"epoch": 2')
        assert header["__metadata__"]["kaggle_utils"] != beside
    text = json.dumps(header, indent=3).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    if change == "nothing":
        tensors, beside = load_tensors(path)
        assert tensors["first"].tolist() == [0, 1, 2, 3] and beside == {"epoch": 1}
    else:
        with pytest.raises(ValueError, match="file cannot be read .its checksum does not match: the file is damaged"):
            load_tensors(path)


def test_an_unfinished_folder_is_told_as_such(tmp_path):
    folder = tmp_path / "vnet_model_ribosome"
    with pytest.raises(FileNotFoundError, match="vnet_model_ribosome is not a finished model; run the training"):
        load_model(folder)
    save_weights(folder, build_model("vnet", 4).state_dict())  # as in the middle of a training
    with pytest.raises(FileNotFoundError, match="vnet_model_ribosome is not a finished model"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="vnet_model_ribosome is not a finished model"):
        read_config(folder)


@pytest.mark.parametrize("file", ["thresholds.json", "weights.safetensors"])
def test_a_missing_file_is_named(file, tmp_path):
    save(tmp_path / "model_a")
    (tmp_path / "model_a" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"model_a.{file}"):
        load_model(tmp_path / "model_a")


@pytest.mark.parametrize("file", ["config.json", "thresholds.json"])
@pytest.mark.parametrize("content", [b"", b'{"architecture": "un', b"\xff\xfe\x00", b"[1, 2]", b"null"])
def test_broken_json_is_named(file, content, tmp_path):
    save(tmp_path / "model_a")
    (tmp_path / "model_a" / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"model_a.{file} .*train the model again"):
        load_model(tmp_path / "model_a")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_weights_are_refused(kept, tmp_path):
    save(tmp_path / "model_a")
    path = tmp_path / "model_a" / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"model_a.weights\.safetensors cannot be read \(.*\); train the model again"):
        load_model(tmp_path / "model_a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vnet"}, r"weights\.safetensors is of another network: it lacks enc1.conv1.weight"),
        ({"width": 8}, r"weights\.safetensors is of another network: enc1.0.weight has the shape .4, 1, .*, not .8, 1"),
        ({"width": "4"}, r"config\.json: width is '4', but must be a whole number from 1 to 256"),
        (
            {"architecture": "resnet"},
            r"config\.json: architecture is 'resnet', but must be one of baseline, unet, vnet",
        ),
        ({"particle": "apo-ferritin"}, r"thresholds\.json has no 'apo-ferritin'"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(change, message, tmp_path):
    """In a line, and with the name of one file; all values of a config are in tests/test_strangers.py."""
    save(tmp_path / "model_a")
    save_config(tmp_path / "model_a", {**config_of("unet"), **change}, {"ribosome": 0.25})
    with pytest.raises(ValueError, match=f"model_a.{message}.*; train the model again") as caught:
        load_model(tmp_path / "model_a")
    # torch lists every layer that does not fit, in sixty lines.
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300 + len(str(tmp_path))
    assert str(caught.value).count("model_a") == 1


@pytest.mark.parametrize("key", ["architecture", "width", "particle", "window", "halo"])
def test_a_config_without_what_inference_needs_is_refused(key, tmp_path):
    save(tmp_path / "model_a")
    config = {name: value for name, value in config_of("unet").items() if name != key}
    save_config(tmp_path / "model_a", config, {"ribosome": 0.25})
    with pytest.raises(ValueError, match=rf"model_a.config\.json has no '{key}'; train the model again"):
        load_model(tmp_path / "model_a")


def test_config_is_written_last_so_that_it_marks_a_complete_folder(tmp_path, monkeypatch):
    from kaggle_utils.models import folder

    written = []
    monkeypatch.setattr(folder, "write_text", lambda path, text: written.append((path.name, json.loads(text))))
    save_config(tmp_path, {"a": 1}, {"ribosome": 0.5})
    assert written == [("thresholds.json", {"ribosome": 0.5}), ("config.json", {"a": 1})]
