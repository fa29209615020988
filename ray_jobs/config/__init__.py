"""A recipe: what can be set, how it is read from TOML, and what is refused. Nothing in here imports torch."""
