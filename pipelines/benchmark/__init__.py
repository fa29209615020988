"""How fast the data comes, beside what people use today, in the same run on the same files.

``clips`` the source files and a torch DataLoader on them (PyAV, Pillow, timm's RandAugment, torchvision), ``loader``
ours and the baseline in turns, and whether data or compute is the limit.
"""
