"""An embedded world for fast experiments: procedural pictures and openly SIMULATED EEG.

Nothing in here was recorded from a person. `pictures` draws the stimuli, `eeg` simulates the
responses and writes them in the file format of the published THINGS-EEG2 recordings.
"""
