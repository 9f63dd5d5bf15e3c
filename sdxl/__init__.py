"""The generator: SDXL's files, the layer-wise IP-Adapter in its attention, and denoising.

In: weight files, an injection map, embeddings [B, M, D]. Out: pictures uint8 [B, H, W, 3].
"""
