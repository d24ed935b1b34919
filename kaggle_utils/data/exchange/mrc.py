"""MRC, as IMOD, RELION, Warp, AreTomo and others write it (https://www.ccpem.ac.uk/mrc_format/mrc2014.php)."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from kaggle_utils.data.exchange.sizes import Raw, check_shape, explain_fault, explain_missing

_SIGNED = 1  # the bit of IMOD's flags that says that bytes have a sign


def read_mrc(path: Path) -> Raw:
    """Read an MRC file of either byte order, also a compressed one.

    The axes are put in the order z, y, x by the header's `mapc`, `mapr`, `maps`. Bytes have a sign, as the standard
    says, unless IMOD's flags say that they have none. Raises as `read_volume`."""
    try:
        import mrcfile
    except ImportError:
        raise explain_missing("mrcfile") from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with mrcfile.open(path, permissive=True, header_only=True) as file:
                header = file.header
                shape = tuple(int(header[size]) for size in ("nz", "ny", "nx"))
                mode, space_group = int(header.mode), int(header.ispg)
            if mode in (3, 4):
                raise ValueError("holds complex numbers, a Fourier transform; give the tomogram itself")
            if 401 <= space_group <= 630:
                raise ValueError("holds several volumes; write each into a file of its own")
            if min(shape) < 1:
                raise ValueError(f"the header says {shape} voxels, so this is no MRC file; write it again")
            check_shape(path, shape)
            compressed = path.suffix.lower() in (".gz", ".bz2")
            with (mrcfile.open if compressed else mrcfile.mmap)(path, permissive=True) as file:
                if file.data is None:
                    reasons = "; ".join(dict.fromkeys(str(warning.message) for warning in caught))
                    raise ValueError(f"is no whole MRC file ({reasons}); copy or write it again")
                data, notes = _give_sign(file.data, header)
                order, axes = _find_order(header)
                volume = np.ascontiguousarray(data.transpose(order), dtype=np.float32)
        except (ValueError, RuntimeError, EOFError) as error:
            raise explain_fault(path, error, "copy or write the tomogram again") from error
    edges = [float(header.cella[axis]) / int(header[f"m{axis}"]) if header[f"m{axis}"] else 0.0 for axis in "zyx"]
    for axis, edge in zip("zyx", edges, strict=True):
        if edge < 0:
            notes.append(f"the header counts {axis} backwards; if picks were made so, add --flip {axis}")
    if space_group == 0 and int(header.mz) == 1:
        notes.append(f"{path} says that it is a stack of images, as tilt series are; give the tomogram if it is one")
    told = (str(warning.message) for warning in caught)
    return Raw(volume, tuple(map(abs, edges)), (*axes, *notes, *dict.fromkeys(told)))  # type: ignore[arg-type]


def _give_sign(data: np.ndarray, header: Any) -> tuple[np.ndarray, list[str]]:
    """Return the voxels of a file, and what to say if they are bytes."""
    if data.dtype != np.int8:
        return data, []
    order = header.mode.dtype.newbyteorder("=") if header.mode.dtype.isnative else header.mode.dtype
    stamp, flags = np.frombuffer(header.extra2.tobytes()[40:48], order)  # bytes 152 to 159 of the file
    if int(stamp) == 1146047817 and not int(flags) & _SIGNED:  # "IMOD"
        return data.view(np.uint8), ["bytes are read without a sign, as IMOD's flags say"]
    return data, ["bytes are read with a sign, as the MRC standard says"]


def _find_order(header: Any) -> tuple[tuple[int, ...], list[str]]:
    """Return the axes of the data that are z, y, x, and what to say if they are others than usual."""
    axes = [int(header[name]) for name in ("maps", "mapr", "mapc")]  # of sections, rows, columns: 1 is x, 3 is z
    if axes == [0, 0, 0]:  # old programs leave them out
        axes = [3, 2, 1]
    if sorted(axes) != [1, 2, 3]:
        raise ValueError(f"mapc, mapr and maps are {axes[::-1]}, which are no axes; write the tomogram again")
    order = tuple(axes.index(axis) for axis in (3, 2, 1))
    names = ", ".join("xyz"[axis - 1] for axis in axes)
    return order, [] if order == (0, 1, 2) else [f"the file's axes are {names}; they are put in the order z, y, x"]
