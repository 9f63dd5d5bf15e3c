"""From EEG to embeddings: encoders, aligners, what a trained model is, and its controls.

In: EEG [B, C, T] and subjects [B]. Out: {modality: [B, D]}, un-normalised CLIP embeddings.
"""
