"""The synthetic world: short videos with sound whose shape, motion and tone are independent of each other.

``config`` (what may be chosen) -> ``factors`` (which combination is sample i) -> ``drawing`` and ``sounding``
(pixels and samples, pure) -> ``encoding`` (an ordinary mp4) -> ``generation`` (files, workers, resuming).

Every sample is a pure function of (settings, split, index): a killed generation continues, a larger one extends a
smaller one, and two machines with the same tool versions write the same bytes.
"""
