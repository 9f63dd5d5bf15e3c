"""Run directories: what a stage was asked, what it read and wrote, and the files it is kept in.

In: resolved options, inputs, records. Out: whole files or none (atomic, locked, hashed), so that
the same command goes on where it stopped.
"""
