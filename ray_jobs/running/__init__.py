"""One run: put together from its recipe, started on this machine, ended with its failure on record."""
