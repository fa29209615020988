"""The model: experts for space, time and sound, joined by bottleneck cross-attention.

Where to look: `config` what can be chosen and `presets` what was published (no torch needed), `structure` who talks to
whom in which layer, `network` the whole model, `layers` one layer of all experts, `bottleneck` B-CA, `experts` the
encoders, `positions` their tables and the clock of the sound, `heads` which feature predicts what, `parameters` what is
trained and how a model is built, `inspect` size, cost and attention.

Nothing is imported here, so that a recipe can be checked without waiting for torch.
"""
