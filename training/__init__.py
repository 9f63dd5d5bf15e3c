"""Stage 2: the loop that fits encoder and aligner, its checkpoints, processes and monitor.

In: recordings joined with a feature bank. Out: a run directory with ``checkpoints/best``.
"""
