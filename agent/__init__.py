"""Floor 3: what runs in a pod: the HTTP API in one process, the engine in another."""
