"""Clocks, run records and summaries."""
