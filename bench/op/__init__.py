"""The op calls of a step, on every backend, and the least time they can take."""
