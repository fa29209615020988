"""Shards in, ClipBatches out: a pure plan, threads that fetch and check bytes, and a decoding backend."""
