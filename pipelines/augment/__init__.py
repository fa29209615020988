"""Augmentation of clips: drawn ahead as data, applied by every backend by the same formulas."""
