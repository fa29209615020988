"""How fast the model is on a device: beside the plain formulation, and beside what the device can do at best.

``case`` one model in one variant, and the plain baseline; ``measure`` limits, datasheets' peaks and memory; ``model``
the rounds and the report.
"""
