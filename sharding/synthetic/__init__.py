"""The synthetic world: short videos with sound in which seeing, moving and hearing all matter. See README.md here.

``config`` and ``difficulty`` (what may be chosen) -> ``factors`` and ``binding`` (what sample i is about, independent
of everything else) -> ``labels`` (what it is called) -> ``scenes`` and ``clutter`` (what is in the picture),
``drawing`` and ``sounding`` (pixels and samples) -> ``encoding`` (an ordinary mp4) -> ``generation`` (files, workers,
resuming). ``ceilings`` says how right a model can be at all; ``contact_sheet`` makes the picture of README.md.

Every sample is a pure function of (settings, split, index): a killed generation continues, a larger one extends a
smaller one, and two machines with the same tool versions write the same bytes.
"""
