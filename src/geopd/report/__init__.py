"""Tables and claims of a results folder -> figures and one HTML page. Reads results only; never torch."""

from geopd.report.page import render, write_report

__all__ = ["render", "write_report"]
