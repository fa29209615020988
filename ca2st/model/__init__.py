"""The model: experts for space, time and sound, joined by bottleneck cross-attention.

Nothing is imported here, so that a recipe can be checked without waiting for torch. Map: ca2st/README.md.
"""
