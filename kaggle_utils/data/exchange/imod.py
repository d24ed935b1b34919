"""IMOD models, of which the points are read (https://bio3d.colorado.edu/imod/doc/binspec.html)."""

import io
import struct
from pathlib import Path

import numpy as np
import pandas as pd

from kaggle_utils.data.exchange.sizes import explain_missing
from kaggle_utils.system.files import read_bytes

_MOST_BYTES = 2**28
_FLIPPED = 1 << 16  # the bit of the model's flags for "last viewed on an image whose y and z are exchanged"
_CORNER = (0.5, 0.5, 0.0)  # IMOD counts x and y from the corner of the first voxel, z from its middle


def read_imod(path: Path) -> tuple[pd.DataFrame, str]:
    """Return all points of a model, in voxels from the centre of the first one, with the object's name as
    `particle_type` where it has one; and "voxel", their unit. Raises ModuleNotFoundError without imodmodel, and
    ValueError, naming the file, for one that is no model or was drawn on a flipped image."""
    try:
        from imodmodel.parsers import parse_model
    except ImportError:
        raise explain_missing("imodmodel") from None
    try:
        model = parse_model(_Whole(read_bytes(path, _MOST_BYTES)))
    except (ValueError, struct.error, IndexError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path}: is not a whole IMOD model ({error}); save it again") from error
    if model.id.IMOD_file_id != "IMOD":
        raise ValueError(f"{path}: is not an IMOD model; save it again")
    if int(model.header.flags) & _FLIPPED:
        raise ValueError(
            f"{path}: was drawn on an image whose y and z are exchanged; in 3dmod choose Flip, save it again"
        )
    tables = []
    for thing in model.objects:
        points = np.concatenate([np.empty((0, 3)), *(contour.points for contour in thing.contours)]) - _CORNER
        tables.append(pd.DataFrame(points, columns=list("xyz")).assign(particle_type=str(thing.header.name).strip()))
    if not sum(map(len, tables)):
        raise ValueError(f"{path}: the model has no points; give one with a point for each particle")
    return pd.concat(tables, ignore_index=True), "voxel"


class _Whole(io.BytesIO):
    """Bytes that end with an error: the parser would look for the end of a cut file for ever."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if size and len(content) < size:
            raise ValueError("it ends too early")
        return content
