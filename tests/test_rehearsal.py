"""A rehearsal on a fake Kaggle machine: no network, read-only inputs in both mount conventions, and a Python that has
what Kaggle's image has, so no zarr, no cc3d, no copick. The notebooks run there as they are committed."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fake_machine import run_in_machine, why_not

from kaggle_utils.data.phantom import write_phantom
from kaggle_utils.inference.ensemble import save_choice
from kaggle_utils.kaggle import wheels
from kaggle_utils.kaggle.notebooks import NOTEBOOKS
from kaggle_utils.kaggle.publish import build_folder
from kaggle_utils.kaggle.wheels import PYTHON, collect_wheels
from kaggle_utils.submission.csv_file import read_submission
from kaggle_utils.submission.rules import validate_submission

ROOT = Path(__file__).resolve().parents[1]
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

# What notebooks import or run in, as far as Kaggle's image has it; but torch as constraints.txt has it.
IMAGE = [f"{name}=={version}" for name, (version, _) in wheels.IMAGE.items() if name not in ("torch", "ipython")]
IMAGE += ["torch", "ipykernel", "nbclient", "nbformat"]
ABSENT = ["zarr", "numcodecs", "cc3d", "copick", "kaggle_utils"]
SLUG = "czii-cryo-et-object-identification"
TEST_RUNS = ["TS_5_4", "TS_999_9"]  # the first is also the name of a training run, the second nobody has seen

# Where Kaggle mounts a competition, a dataset and another notebook's output: until 2025, and now.
CONVENTIONS = {
    "old": (SLUG, "kaggle-utils", "czii-05-ensemble"),
    "new": (f"competitions/{SLUG}", "datasets/someone/kaggle-utils", "notebooks/someone/czii-05-ensemble"),
}

SCORING = {"KAGGLE_IS_COMPETITION_RERUN": "1"}

# Runs in the machine, and tells what it is like there before it runs a notebook from top to bottom.
PLAY = f"""
import fcntl, importlib.util, json, pathlib, socket, struct, sys
import nbclient, nbformat

facts = {{"connected": [], "written": []}}
facts["present"] = [name for name in {ABSENT} if importlib.util.find_spec(name)]
facts["devices"] = [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]
for address in ("1.1.1.1", 53), ("pypi.org", 443):
    try:
        socket.create_connection(address, timeout=10)
        facts["connected"].append(address)
    except OSError:
        pass
facts["inputs"] = sorted(str(path) for path in pathlib.Path("/kaggle/input").rglob("*") if path.is_mount())
for folder in facts["inputs"]:
    try:
        pathlib.Path(folder, "new").touch()
        facts["written"].append(folder)
    except OSError:
        pass
pathlib.Path("/kaggle/working/facts.json").write_text(json.dumps(facts))
with socket.socket() as control:  # a machine talks to itself, as a notebook does to its kernel; up and running
    fcntl.ioctl(control, 0x8914, struct.pack("16sh22x", b"lo", 0x41))
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, kernel_name="python3").execute(cwd="/kaggle/working")
finally:
    nbformat.write(notebook, "/kaggle/working/__notebook__.ipynb")
"""


def find_python() -> str | None:
    """The Python of Kaggle's image, where there is one."""
    candidates = [sys.executable, shutil.which(f"python{PYTHON}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{PYTHON}*/bin/python")))
    for candidate in filter(None, candidates):
        code = f"import ensurepip, lzma, ssl, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '{PYTHON}')"
        if subprocess.run([candidate, "-c", code], capture_output=True).returncode == 0:
            return candidate
    return None


@pytest.fixture(scope="session")
def image(request):
    """A virtual environment with what the image has. It stays in pytest's cache, for it takes minutes. It is of the
    Python that runs the tests: for another, a package index may have torch only with gigabytes of CUDA."""
    python = sys.executable
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256(repr((python, IMAGE, constraints.read_bytes())).encode()).hexdigest()
    image = request.config.cache.mkdir("kaggle_image") / "image"
    stamp = image / "stamp.txt"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        subprocess.run([python, "-m", "venv", "--clear", image], check=True)
        install = ["-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([image / "bin/python", *install, torch, *IMAGE], check=True)
        # Compile what notebooks import, and not the thousands of files that they don't: the machine cannot write here.
        imports = "import torch, pandas, scipy.ndimage, matplotlib.pyplot, tqdm.auto, ipykernel.kernelapp, nbclient"
        subprocess.run([image / "bin/python", "-c", imports], check=True)
        stamp.write_text(wanted)
    return image


@pytest.fixture(scope="session")
def dataset(image, untrained_pairs, tmp_path_factory):
    """What `publish` makes a dataset of: wheels and models, trained elsewhere at full scale, in one flat folder."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(untrained_pairs, folder / "work/models/report-full")
    for path in folder.glob("work/models/*/*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": "report", "scale": "full"}))
    save_choice(folder / "work", "average", "report-full")
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    python = subprocess.run([image / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout
    models = [folder / "work/models/report-full"]
    return build_folder("someone", models, folder / "out", python=python.strip()) / "dataset"


@pytest.fixture(scope="session")
def competition(tmp_path_factory):
    """The competition's files: no truth of the test runs, and nothing that tells a phantom."""
    data = write_phantom(tmp_path_factory.mktemp("czii"), runs=2, test_runs=2, shape=(40, 64, 64))
    for split, names in {"train": ["TS_5_4", "TS_69_2"], "test": TEST_RUNS}.items():
        for kind in data.glob(f"{split}/*/ExperimentRuns"):
            for old, new in zip(sorted(kind.iterdir()), names, strict=True):
                old.rename(kind / new)
    shutil.rmtree(data / "test_truth")
    (data / "phantom.json").unlink()
    return data


@pytest.fixture
def play(image, tmp_path):
    """Runs a committed notebook in a new machine with these inputs; returns it as executed, and its work folder."""

    def run(name: str, inputs: dict[str, Path], environ: dict[str, str] | None = None):
        # A layer over the image, for the notebook installs into it.
        layer = tmp_path / "layer"
        python = layer / "bin/python"
        subprocess.run([image / "bin/python", "-m", "venv", "--without-pip", layer], check=True)
        packages = next(image.glob("lib/python3.*/site-packages"))
        (next(layer.glob("lib/python3.*/site-packages")) / "image.pth").write_text(f"{packages}\n")
        base = subprocess.run([python, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True)
        (tmp_path / "working").mkdir(), (tmp_path / "src").mkdir()
        shutil.copy(NOTEBOOKS / f"{name}.ipynb", tmp_path / "src")
        mounts = {folder: ("ro", Path(folder)) for folder in (base.stdout.strip(), str(image))}
        mounts |= {layer: ("rw", layer), "/kaggle/src": ("ro", tmp_path / "src")}
        mounts |= {f"/kaggle/input/{place}": ("ro", folder) for place, folder in inputs.items()}
        mounts |= {"/kaggle/working": ("rw", tmp_path / "working")}
        environ = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "OMP_NUM_THREADS": "1"} | (environ or {})
        command = [python, "-c", PLAY, f"/kaggle/src/{name}.ipynb"]
        done = run_in_machine(command, mounts, environ, "/kaggle/working", timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        facts = json.loads((tmp_path / "working/facts.json").read_text())
        like_kaggle = {"devices": ["lo"], "connected": [], "present": [], "written": []}
        assert facts == like_kaggle | {"inputs": sorted(f"/kaggle/input/{place}" for place in inputs)}
        return nbformat.read(tmp_path / "working/__notebook__.ipynb", as_version=4), tmp_path / "working"

    return run


def shown(notebook) -> str:
    """All that the cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize(
    ("convention", "scoring"), [("new", SCORING), pytest.param("old", {}, marks=pytest.mark.thorough)]
)
def test_notebook_06_makes_a_valid_submission(play, dataset, competition, convention, scoring, tmp_path):
    """In the scoring run it does nothing after the submission that could fail."""
    mounts = CONVENTIONS[convention]
    (tmp_path / "earlier").mkdir()
    save_choice(
        tmp_path / "earlier", "mixed", "report-full"
    )  # the dataset says otherwise, but what notebook 05 left is newer
    inputs = dict(zip(mounts, (competition, dataset, tmp_path / "earlier"), strict=True))
    notebook, work = play("06_submission", inputs, scoring)
    text = shown(notebook)
    wheel = next(dataset.glob("kaggle_utils-*.whl")).name
    first = f"package: /kaggle/input/{mounts[1]}/{wheel} | data: /kaggle/input/{mounts[0]} | work: /kaggle/working"
    assert text.splitlines()[0] == f"kaggle | {first}"
    assert "ensemble 'mixed'" in text and "submission.csv is valid" in text
    assert validate_submission(work / "submission.csv", competition) == []
    assert set(read_submission(work / "submission.csv")["experiment"]) == set(TEST_RUNS)
    drawn = any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert drawn == (work / "copick").exists() == (not scoring)


@pytest.mark.thorough
def test_notebook_03_trains_on_the_phantom_where_there_are_no_data(play, dataset):
    notebook, work = play("03_unet_training", {"kaggle-utils": dataset}, {"CZII_SCALE": "smoke"})
    assert "data: none found, so a phantom" in shown(notebook)
    models = sorted(
        str(config.parent.relative_to(work / "models")) for config in work.glob("models/*-smoke/*/config.json")
    )
    folds = [f"competition-smoke/3d_unet_model_fold_{fold}" for fold in range(2)]
    assert models == folds


def test_the_wheels_work_on_the_python_of_kaggles_image(tmp_path):
    """All but the kit itself, which wants torch; installed as the first cell does it, beside what the image has."""
    python = find_python()
    if python is None:
        pytest.skip(f"no Python {PYTHON} here")
    (tmp_path / "wheels").mkdir()
    collect_wheels(tmp_path / "wheels", PYTHON)
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    installed = tmp_path / "venv/bin/python"
    install = [installed, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "numpy==2.0.2", "packaging", "typing_extensions", "pyyaml"], check=True)
    offline = ["--no-index", "--find-links", tmp_path / "wheels"]
    subprocess.run([*install, *offline, "zarr", "connected-components-3d"], check=True)
    code = """
import cc3d, numpy, zarr
from numcodecs import Blosc
settings = {"chunks": (2, 2, 2), "dtype": "<f4", "compressor": Blosc(cname="lz4"), "zarr_format": 2}
array = zarr.create(shape=(4, 4, 4), store="a", **settings)
array[...] = numpy.arange(64).reshape(4, 4, 4)
read = zarr.open_array("a", mode="r")[...]
labels = cc3d.connected_components((read % 3 == 0).astype(numpy.uint8), connectivity=26)
print(read.sum(), labels.max(), numpy.__version__)
"""
    done = subprocess.run([installed, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2016.0", "1", "2.0.2"], done.stderr
