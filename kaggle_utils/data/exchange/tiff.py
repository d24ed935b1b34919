"""TIFF stacks, as ImageJ, napari and OME's programs write them."""

from pathlib import Path
from typing import Any

import numpy as np

from kaggle_utils.data.exchange.sizes import UNITS, Raw, check_shape, explain_fault, explain_missing


def read_tiff(path: Path) -> Raw:
    """Read a TIFF file with an image for each slice, z upwards; rows are y. Raises as `read_volume`.

    ImageJ's or OME's metadata say how large voxels are, if anything does: a bare TIFF only knows dots per inch."""
    try:
        from tifffile import TiffFile, TiffFileError
    except ImportError:
        raise explain_missing("tifffile") from None
    try:
        with TiffFile(path) as file:
            if len(file.series) != 1:
                raise ValueError(f"has {len(file.series)} series of images; write one stack of images of the same size")
            series, page = file.series[0], file.pages[0]
            kept = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if size > 1]
            if "S" in [axis for axis, _ in kept]:
                raise ValueError("has colours; write it in grey")
            if series.dtype is None or series.dtype.kind not in "uif":
                raise ValueError(f"has voxels of type {series.dtype}, which are not real numbers; write it again")
            check_shape(path, [size for _, size in kept])
            spacing = _read_imagej(file, page) or _read_ome(file)
            volume = series.asarray().reshape([size for _, size in kept]).astype(np.float32)
    except (TiffFileError, ValueError, IndexError, KeyError, RuntimeError, ImportError) as error:
        raise explain_fault(path, error, "write the stack again, without compression") from error
    first = kept[0][0]
    notes = () if first in "ZQI" else (f"the file calls its first axis {first}; its images are taken for slices",)
    return Raw(volume, spacing, notes)


def _read_imagej(file: Any, page: Any) -> tuple[float, float, float] | None:
    known = file.imagej_metadata or {}
    unit = UNITS.get(str(known.get("unit", "")).replace("\\u00B5", "\u00b5"))
    if unit is None or "XResolution" not in page.tags:
        return None
    pairs = [page.tags[name].value for name in ("YResolution", "XResolution")]
    across = [denominator / numerator if numerator else 0.0 for numerator, denominator in pairs]
    z = float(known.get("spacing", across[1]))
    return z * unit, across[0] * unit, across[1] * unit


def _read_ome(file: Any) -> tuple[float, float, float] | None:
    if not file.is_ome:
        return None
    from tifffile import xml2dict

    pixels = xml2dict(file.ome_metadata)["OME"]["Image"]
    pixels = (pixels[0] if isinstance(pixels, list) else pixels)["Pixels"]
    sizes = [(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "\u00b5m")) for axis in "ZYX"]
    if any(size is None or unit not in UNITS for size, unit in sizes):
        return None
    z, y, x = (float(size) * UNITS[unit] for size, unit in sizes)
    return z, y, x
