"""Stage 4: retrieval and picture scores, each beside its control, with intervals.

In: a trained run, a bank, folders of pictures. Out: rows of ``results.json`` and tables.
"""
