"""The model: experts for space, time and sound, joined by bottleneck cross-attention.

Where to look: `config` what can be chosen (no torch needed), `structure` who talks to whom in which layer, `build` and
`holistic` the whole model, `layer` one layer of all experts, `bottleneck` B-CA, `experts` the encoders, `time_codes`
the clock of the sound, `heads` which feature predicts what, `parameters` what is trained, `info` size and cost.

Nothing is imported here, so that a recipe can be checked without waiting for torch.
"""
