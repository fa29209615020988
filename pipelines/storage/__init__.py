"""Shards and their bytes: local files, the cache of remote sets, indexes, members by range."""
