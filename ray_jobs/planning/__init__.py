"""What a run will do, before it does it: ``--dry-run``, and what a resume changes."""
