"""Tomograms and positions of other programs, in and out.

`volumes` reads tomograms (`mrc`, `tiff`, `ngff` with `zarr3`), `positions` reads picks (`star`, `tables`, `imod`),
`doubts` tells when the two do not fit, `importing` makes runs of both. `export` writes picks for other programs, and
`masks` leaves picks out.
The packages that read foreign formats are the extra `formats`; nothing here is needed inside a Kaggle notebook."""

from kaggle_utils.data.exchange.export import export_picks
from kaggle_utils.data.exchange.importing import Imported, import_runs
from kaggle_utils.data.exchange.masks import make_filter
from kaggle_utils.data.exchange.positions import Positions, find_positions, parse_unit, read_positions
from kaggle_utils.data.exchange.volumes import Source, find_files, read_volume

__all__ = [
    "Imported", "Positions", "Source", "export_picks", "find_files", "find_positions", "import_runs", "make_filter",
    "parse_unit", "read_positions", "read_volume",
]  # fmt: skip
