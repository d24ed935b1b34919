"""The tables of results, from the files in benchmarks/results/; `make` puts them into the pages."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import accuracy  # noqa: E402
import arithmetic  # noqa: E402
import leads  # noqa: E402

from kaggle_utils.particles import PARTICLES  # noqa: E402

CONTEST = {"device": "CPU", "minutes allowed": 10.0}  # what the pages say of the contenders' training
SHORT = {**CONTEST, "minutes allowed": 2.5}
LONG = {**CONTEST, "minutes allowed": 60.0}
FULL = {"scale": "full", "minutes allowed": 1.75}
WHO = {
    "competition": "this kit, two of the competition recipe's U-Nets",
    "competition_vnet": "this kit, two of its V-Nets",
    "report": "this kit, the report's specialists",
    "first_seg": "the first team's segmentation network",
    "first_seg_no_mixup": "the first team's segmentation network, without mixup",
    "first_det": "the first team's detection network",
    "second": "the second team's U-Net",
    "second_dense": "the second team's DenseVNet",
    "fourth": "the fourth team's network of slices",
    "unet": "the host's example, MONAI's U-Net",
    "segresnet": "the host's example, with MONAI's SegResNet",
    "dynunet": "the host's example, with MONAI's DynUNet",
    "unet_ours": "MONAI's U-Net in this kit's recipe",
    "segresnet_ours": "MONAI's SegResNet in this kit's recipe",
    "dynunet_ours": "MONAI's DynUNet in this kit's recipe",
}
THRESHOLDS = {  # the ways that are shown: key of the file -> words
    "argmax": "the best on the runs that were left out",
    "plateau": "the middle of the plateau around it",
    "tuned": "the best for shifted confidences",
    "levelled, tuned": "the same, confidences levelled by each run's best candidates (the kit's)",
}
AIMS = {"fbeta": "F-beta (`--aim fbeta`)", "f1": "F1 (`--aim f1`)"}


def tabulate(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fence(text: str) -> str:
    """Return a block of code."""
    return f"```text\n{text.strip()}\n```"


def read(path: str) -> Any:
    """Return a result file."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


# ---- accuracy


def read_contest(conditions: dict[str, object] = CONTEST) -> dict[str, list[dict]]:
    """Return the records of each contender under such conditions, the best first, and last those that did not run on
    all data sets."""
    groups: dict[str, list[dict]] = {}
    for path in sorted(accuracy.RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(record[key] == value for key, value in conditions.items()):
            groups.setdefault(record["contender"], []).append(record)
    sets = list_sets(groups)

    def rank(group: list[dict]) -> tuple[bool, float]:
        return is_whole(group, sets), accuracy.average(group, "all")["f_beta"]

    return dict(sorted(groups.items(), key=lambda item: rank(item[1]), reverse=True))


def is_whole(group: list[dict], sets: list[str]) -> bool:
    """Whether a contender ran on all data sets, so that its mean can stand beside others'."""
    return {record["data"] for record in group} == set(sets)


def list_sets(groups: dict[str, list[dict]]) -> list[str]:
    """Return the names of all data sets."""
    return sorted({record["data"] for group in groups.values() for record in group})


def show_scores() -> str:
    """Return the README's table: the contenders that ran on all data sets."""
    groups = read_contest()
    sets, rows = list_sets(groups), []
    for name, group in groups.items():
        if is_whole(group, sets):
            total = accuracy.average(group, "all")
            parts = [accuracy.average([r for r in group if r["data"] == one], "all")["f_beta"] for one in sets]
            mean = f"**{total['f_beta']:.3f}** ({total['low']:.3f}-{total['high']:.3f})"
            rows.append([f"`{name}`", name_contender(group), mean, *(f"{part:.3f}" for part in parts)])
    return tabulate(["", "what it is", "F-beta", *sets], rows)


def show_accuracy(conditions: dict[str, object] = CONTEST) -> str:
    """Return the table of all contenders: F-beta as picked / in hindsight. The cells of sets on which one did not run
    are empty, as are its means."""
    groups = read_contest(conditions)
    if not groups:
        raise ValueError(f"no result was measured under {conditions}")
    sets, rows = list_sets(groups), []
    for name, group in groups.items():
        whole, total = is_whole(group, sets), accuracy.average(group, "all")
        span = f"**{total['f_beta']:.3f}** ({total['low']:.3f}-{total['high']:.3f}) / {total['hindsight']:.3f}"
        cells = [f"`{name}`", span if whole else ""]
        for one in sets:
            own = [record for record in group if record["data"] == one]
            cells.append(_pair(accuracy.average(own, "all"), 3) if own else "")
        cells += [_pair(accuracy.average(group, particle), 2) if whole else "" for particle in accuracy.SCORED]
        rows.append([*cells, f"{group[0]['parameters'] / 1e6:.2f} M", str(len({record["seed"] for record in group}))])
    return tabulate(["", "mean", *sets, *accuracy.SCORED, "parameters", "seeds"], rows)


def list_contenders() -> str:
    """Return what each contender is and how it was scaled, a line each."""
    groups = read_contest().items()
    return "\n".join(f"- `{name}`: {name_contender(group)}; {group[0]['scaled']}" for name, group in groups)


def show_leads() -> str:
    """Return what each change to the recipe gave, the largest gain first; of those measured with several numbers of
    steps, a row for each."""
    return leads.make_table(read("leads.json"))


def name_contender(group: list[dict]) -> str:
    """Return in words what a contender is: one of WHO, or the competition recipe with other settings."""
    record = group[0]
    settings = " ".join(f"{key}={value}" for key, value in record["recipe"].items())
    networks = record["scaled"].rpartition(", ")[2]
    return f"this kit, {networks} with `{settings}`" if settings else WHO[record["contender"]]


def _pair(scores: dict[str, float], digits: int) -> str:
    return f"{scores['f_beta']:.{digits}f} / {scores['hindsight']:.{digits}f}"


def show_thresholds() -> str:
    """Return the loss of each way to choose thresholds, for each data set and in the mean."""
    losses = read("thresholds.json")["rows"]
    rows = []
    for way, words in THRESHOLDS.items():
        values = [-column[way] for column in losses.values()]
        rows.append([words, *(f"{value:.3f}" for value in [*values, sum(values) / len(values)])])
    return tabulate(["loss to hindsight", *losses, "mean"], rows)


def show_aims() -> str:
    """Return scores of picks by the aim of their thresholds, without and with one particle a place."""
    table = pd.DataFrame(read("aims.json")["scores"]).drop(columns="data")
    means = table.groupby(["aim", "one a place", "particle"], sort=False).mean()
    rows = []
    for aim, one_place in means.index.droplevel("particle").unique():
        whole, words = means.loc[aim, one_place, "all"], AIMS.get(aim, f"`--precision {aim}`")
        cells = [words, "yes" if one_place else "no"]
        cells += [f"{whole[column]:.3f}" for column in ("f_beta", "f1", "precision", "recall")] + [
            f"{whole['picks']:.0f}"
        ]
        for particle in accuracy.SCORED:
            part = means.loc[aim, one_place, particle]
            precision = f"{part['precision']:.2f}" if part["picks"] else "no picks"
            cells.append(f"{precision} / {part['recall']:.2f}")
        rows.append(cells)
    heads = ["thresholds for", "one particle a place", "F-beta", "F1", "precision", "recall", "picks"]
    return tabulate([*heads, *(f"{particle}: precision / recall" for particle in accuracy.SCORED)], rows)


def show_walk() -> str:
    """Return the scores of particles that are none of the competition's, by the aim of thresholds and the voxel
    spacing."""
    cells: dict[str, list[str]] = {"fbeta": ["thresholds as they are"], "f1": ["`--aim f1`"]}
    heads = [""]
    for score in read("walk.json")["scores"]:
        counts = pd.DataFrame(score["particles"]).T
        f1 = (2 * counts["tp"] / (2 * counts["tp"] + counts["fp"] + counts["fn"])).mean()
        cells[score["aim"]] += [f"{score['f_beta']:.3f}", f"{f1:.2f}"]
        if score["aim"] == "f1":
            heads += [f"{score['voxel spacing (A)']:.2f} A: F-beta", "F1"]
    return tabulate(heads, cells.values())


# ---- the demo


def read_demos() -> dict[str, dict]:
    """Return the scores of all runs of the demo, by the name of their file."""
    return {path.stem: read(f"demo/{path.name}") for path in sorted((RESULTS / "demo").glob("*.json"))}


def show_demo() -> str:
    """Return how the demo ends, in the first of the runs, and the range of all."""
    demos = read_demos()
    first = next(iter(demos.values()))
    table = pd.DataFrame.from_dict(first["particles"], orient="index")
    table["weight"] = [particle.weight for particle in PARTICLES]
    decimals = dict.fromkeys(["precision", "recall", "f_beta"], "{:.4f}".format)
    lines = [
        "notebooks with their figures:",
        "  .../work/notebooks/01_eda.html  (and five more)",
        "submission: .../submissions/submission.csv",
        "score against .../work/phantom/test_truth/overlay/ExperimentRuns:",
        table.to_string(formatters=decimals),
        f"F-beta (beta = 4), weighted mean: {first['score']:.4f}",
    ]
    scores = [demo["score"] for demo in demos.values()]
    span = f"{len(scores)} runs, with different numbers of threads, ended at {min(scores):.3f} to {max(scores):.3f}. "
    text = f"{span * (len(scores) > 1)}Beta-amylase is never scored, so the kit picks it freely."
    return "\n\n".join([fence("\n".join(lines)), text])


def show_demos() -> str:
    """Return the F-beta of all runs of the demo and of each particle in them."""
    rows = [[name, *_list_f_betas(demo)] for name, demo in read_demos().items()]
    return tabulate(["run of the demo", "F-beta", *accuracy.SCORED], rows)


def show_hard() -> str:
    """Return what networks at demo scale find on hard tomograms: F-beta, that of each particle, and the cost."""
    rows = [[result["what"], *_list_f_betas(result), result["cost"]] for result in read("hard.json")]
    return tabulate(["", "F-beta", *accuracy.SCORED, "cost"], rows)


def _list_f_betas(result: dict) -> list[str]:
    parts = [result["particles"][particle]["f_beta"] for particle in accuracy.SCORED]
    return [f"**{result['score']:.3f}**", *(f"{part:.3f}" for part in parts)]


# ---- speed


def count_arithmetic() -> str:
    """Return what `benchmarks/arithmetic.py` prints."""
    with redirect_stdout(io.StringIO()) as printed:
        arithmetic.main([])
    return fence(printed.getvalue())


def show_costs() -> str:
    """Return how many tomograms a GPU does in an hour, by arithmetic and as measured."""
    table, views = arithmetic.count_recipe("competition")
    seconds = {}
    for speed in (15, 5):
        passes = table["a view: TFLOP"] / speed + table["a view: GB"] / 250
        seconds[f"T4, at {speed} TFLOP/s and 250 GB/s"] = views * (table["networks"] * passes).sum()
    measured = read("gpu-nvidia-h100-80gb-hbm3.json")
    seconds[f"{measured['device']}, measured"] = measured["checks"]["committee"]["rows"][0]["seconds"]
    rows = [[gpu, f"{one:.1f}", f"{3600 / one:.0f}", f"{20_000 * one / 3600:.0f}"] for gpu, one in seconds.items()]
    return tabulate(["a GPU", "seconds a tomogram", "tomograms an hour", "GPU hours for 20,000"], rows)


def show_growth() -> str:
    """Return how seconds and memory grow with voxels and with runs."""
    tables, form = [], {"MB": ".0f", "CP": ".3g"}
    for part, key in (("voxels", "times the voxels"), ("runs", "runs")):
        rows = read("growth.json")[part]
        heads = [key, *(name for name in rows[0] if name != key)]
        cells = [[f"{row[key]:,}", *(f"{row[name]:,{form[name[:2]]}}" for name in heads[1:])] for row in rows]
        tables.append(tabulate(heads, cells))
    return "\n\n".join(tables)


def show_cluster() -> str:
    """Return what a cluster made of 40 runs and of faults."""
    rows = read("growth.json")["cluster"]
    rows = [{**row, "the same bytes": "yes" if row["the same bytes"] else "no"} for row in rows]
    cells = [[cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row.values()] for row in rows]
    return tabulate([*rows[0]], cells)


def show_scale() -> str:
    """Return what scores and files of many runs cost."""
    rows = pd.DataFrame(read("scale.json")).to_dict("records")
    heads = ["of", "seconds", "processor seconds", "MB more"]
    cells = [
        [row["what"], *(cell if isinstance(cell, str) else f"{cell:.3g}" for cell in map(row.get, heads))]
        for row in rows
    ]
    return tabulate(["", *heads], cells)


def show_gpu() -> str:
    """Return what was measured on the GPU."""
    result = read("gpu-nvidia-h100-80gb-hbm3.json")
    checks = {name: check["rows"] for name, check in result["checks"].items()}

    def both(check: str, column: str, form: str, **wanted: object) -> list[str]:
        rows = [row for row in checks[check] if all(row.get(key) == value for key, value in wanted.items())]
        return [form.format(row[column]) for row in rows]

    fed = [
        f"{row['ms a batch']:.1f} ms, the GPU busy {row['busy %']:.0f} % of it"
        for row in checks["training"]
        if row["what"] in ("training unet", "training vnet")
    ]
    committee = checks["committee"][0]
    rows = [
        ["a training step of four crops", *both("steps", "ms", "{:.1f} ms", way="as it is")],
        [
            "the same, kernel by kernel instead of as one CUDA graph",
            *both("steps", "ms", "{:.1f} ms", way="no CUDA graph"),
        ],
        ["a step and the drawing of its crops", *fed],
        [
            "a view of a full-size tomogram, its upload included",
            *both("tomogram", "seconds", "{:.2f} s", way="as it is"),
        ],
        [
            "half precision beside single precision on the CPU: largest difference, as a share of the outputs' range",
            *both("half precision", "difference / range", "{:.4f}"),
        ],
    ]
    total = (
        f"All {committee['networks']} networks with {committee['views']} views take {committee['seconds']:.1f} s "
        f"a tomogram, picks included: {committee['hours for 500 on 2']:.1f} hours for 500 on two such GPUs."
    )
    return f"{tabulate([result['device'], 'U-Net', 'V-Net'], rows)}\n\n{total}"


def show_ways() -> str:
    """Return what one network over a volume takes in four ways, beside the whole volume in one pass."""
    rows = []
    for row in read("inference.json")["ways"]:
        numbers = [f"{row[key]:.2f}" for key in ("time / whole", "time / ours")]
        rows.append([row["way"], *numbers, f"{row['difference']:.1g}", f"{row['peak (GB)']:.2g} GB"])
    return tabulate(["way", "time, to the whole volume's", "time, to ours", "difference", "memory"], rows)


def show_networks() -> str:
    """Return what an ensemble of U-Nets takes, and what that means for the competition's tomograms."""
    rows = []
    for row in read("inference.json")["models"]:
        hours = row[next(key for key in row if key.startswith("hours"))]
        numbers = [f"{row['seconds']:.0f}", f"{row['peak (GB)']:.1f} GB", f"{row['seconds a tomogram']:.0f}"]
        rows.append([str(row["models"]), *numbers, f"{hours:.1f}"])
    return tabulate(["U-Nets", "seconds", "memory", "seconds a tomogram", "hours for 500"], rows)


def show_steps() -> str:
    """Return the times of the steps before and after the networks."""
    rows = []
    for row in read("postprocess.json")["rows"]:
        ours, other = row["ours (s)"], row["other (s)"]
        digits = 0 if row["ratio"] > 10 else 1
        rows.append([row["step"], f"{other:.1f} s", f"{ours:.1f} s", f"{row['ratio']:.{digits}f}", row["check"]])
    return tabulate(["step: the other way", "the other way", "ours", "ratio", "are the results equal?"], rows)
