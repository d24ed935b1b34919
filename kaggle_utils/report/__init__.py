"""What a work folder knows, on one page: `report.html`, which needs no network and can be sent to a colleague.

Comes in: a work folder, and the data. Goes out: one HTML file.
`sources` reads what is on the disk, `gallery` draws runs, `letters` writes numbers and tables, `page` makes the page's
parts of all that, and `report.html` has its words.
Next: the reader."""

from kaggle_utils.report.page import write_report

__all__ = ["write_report"]
