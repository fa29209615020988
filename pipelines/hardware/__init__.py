"""What `ca2st bench gpu` tries on a device: the graphs against the reference, how fast they are, and damaged clips.

``clips`` drawn clips in memory, in every codec, ``parity`` stage by stage against the reference, ``speed`` clips a
second, ``mp4_damage`` the kinds of damage, ``damage`` each of them in a process of its own (``damage_child``). Without
a GPU the same is done by the backends for the CPU, so that everything but the device is tried anywhere.
"""
