"""Stage 0: continuous recordings to trials of the published layout.

In: recordings and events. Out: ``Preprocessed_data_250Hz/sub-XX`` with ``quality.md``.
"""
