"""A run directory in, one self-contained HTML file out: the verdict, curves, warnings and questions to look at."""

from align.report.write import write_report

__all__ = ["write_report"]
