"""Shard format v1: index, writer, manifest, verification, remote sets."""
