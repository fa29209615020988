"""The composition root: recipes, command line, launching, tracking."""
