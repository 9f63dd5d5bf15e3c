"""Stage 3: recipes and sweeps, drawn batch by batch, and the sheets that show them.

In: a decoder's embeddings and SDXL. Out: PNGs, their journal, contact sheets.
"""
