"""Which sample sits where: pure functions of manifest, settings, seed and epoch."""
