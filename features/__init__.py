"""Stage 1: the versions of a picture that CLIP reads, and their embeddings.

In: stimuli. Out: feature banks, one row per stimulus id.
"""
