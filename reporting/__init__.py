"""Stage 5: one self-contained page from any runs.

In: run directories. Out: ``report.html``: tables, figures, gallery.
"""
