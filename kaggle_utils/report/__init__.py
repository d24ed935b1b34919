"""What a work folder knows, on one page: `report.html`, which needs no network and can be sent to a colleague.

Comes in: a work folder, and the data. Goes out: one HTML file.
`sources` reads what is on the disk, `page` makes the page's parts of it, and `report.html` has its words.
Next: the reader."""

from kaggle_utils.report.page import write_report

__all__ = ["write_report"]
