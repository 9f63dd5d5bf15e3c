"""Layers of the ATMS encoder: embedding, attention, transformer, subject-specific layers.

Parameter names follow the public ATM checkpoints, so that their state dicts load by name.
"""
