"""Raw videos and annotation files in, verified WebDataset shards out. Imports neither torch nor Ray."""
