"""What owns blocks of KV and the bytes they lie in: the block pool, the blocks' keys, the host's memory."""
