"""Writes a run's report: one page in HTML that needs no network."""
