"""Floor 2: one engine on one device group. Importing this package imports no torch."""
