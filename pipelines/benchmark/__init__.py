"""How fast the data comes, beside what people use today, in the same run on the same files.

``drawn_clips`` the source files, ``baseline`` a torch DataLoader on them (PyAV, Pillow, timm's RandAugment,
torchvision), ``case`` ours and the baseline as things that can be run for a while, ``loader`` the turns they take,
``headspace`` whether data or compute is the limit, ``conversion`` the converter beside the plain loop, ``report`` what
comes out.
"""
