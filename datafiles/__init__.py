"""What people have on disk: EEG files, pictures, captions, tables, feature banks.

In: paths. Out: checked arrays and lists, joined by stimulus id, or an error that names the file.
"""
