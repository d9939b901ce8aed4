"""The page of one run or several: everything in one HTML file, made from the files of run folders alone."""

from equilibria.train.html.page import write_report

__all__ = ["write_report"]
