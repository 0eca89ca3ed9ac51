"""Reports of runs: a table, CSV, JSON and an HTML page."""

from manifold_hc.extras import require_train

require_train("manifold_hc.report")

from manifold_hc.report.page import write_page
from manifold_hc.report.runs import Run, load_runs
from manifold_hc.report.table import VariantRow, as_csv, as_json, as_table, summarise

__all__ = [
    "Run",
    "VariantRow",
    "as_csv",
    "as_json",
    "as_table",
    "load_runs",
    "summarise",
    "write_page",
]
