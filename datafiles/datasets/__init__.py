"""The published forms of recordings: a file of DATA comes in, EEG [N, R, C, T] with names goes out.

One module per data set: its name, licence, layout, order of pictures, splits and known traps.
"""
