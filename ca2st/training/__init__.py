"""Training: schedule, optimizer, losses, metrics, journal, checkpoints, the loop and multi-view evaluation."""
