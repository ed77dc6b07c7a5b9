"""KV blocks: the pool that owns them, the keys that name their content, and the host memory that is free."""
