"""The synthetic world: short videos with sound in which seeing, moving and hearing all matter. See README.md here.

``config`` (what may be chosen) -> ``factors`` (what sample i is about, independent of everything else, what it is
called, and how right a model can be at all) -> ``clips`` (frames, sound, and mp4 files made by workers).

Every sample is a pure function of (settings, split, index): a killed generation continues, a larger one extends a
smaller one, and two machines with the same tool versions write the same bytes.
"""
