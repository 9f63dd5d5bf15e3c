"""Figures of the report, one module per subject; each returns SVGs in the page's colours."""
