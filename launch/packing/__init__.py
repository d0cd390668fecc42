"""Packing of sources into shards by many processes: options, plan, one shard, where it is kept, and all on Ray Data."""
