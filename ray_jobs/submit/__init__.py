"""Send a training to a Ray cluster as a job, and follow it to its end."""
