"""The command line: range-checked types, the parser, config files, combinations of flags.

In: tokens and ``--config``. Out: resolved options, each with its provenance. The flags themselves
are declared in ``args.py``, those of the embedded world in ``miniature.py``. No torch: ``--help``
answers at once.
"""
