"""One run: its data, its model, its processes, its plan, its failures, and inference with what it made."""
