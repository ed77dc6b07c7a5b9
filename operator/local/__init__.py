"""The local runtime: what the operator does for pods, done for processes on one machine."""
