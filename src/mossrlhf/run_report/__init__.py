"""What a run has left in its folder, as one HTML page that needs nothing else."""

from mossrlhf.run_report.page import plot_run, run_page, write_report
from mossrlhf.run_report.reading import RunFolder, read_run

__all__ = ["RunFolder", "plot_run", "read_run", "run_page", "write_report"]
