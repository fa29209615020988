"""What is drawn for a view of a clip: frames and augmentation, keyed by seed, epoch and sample."""
