"""MLflow follows the journal of a run: later, from another process, and without the training noticing."""
