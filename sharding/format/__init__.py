"""Shard format v1: index, writer, manifest, remote sets."""
