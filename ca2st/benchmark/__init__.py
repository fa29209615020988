"""How fast the model is on a device: beside the plain formulation, and beside what the device can do at best.

``config`` what to measure, ``case`` one model in one variant with its forward pass and training step, ``process`` a
case in a process of its own, ``plain`` the baseline, ``limits`` the device's limit, ``copies`` how fast it copies,
``model`` the rounds, ``report`` what comes out.
"""
