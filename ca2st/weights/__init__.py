"""Weights in and out: checkpoints of others, strict loading, the expert store, published names, golden files."""
