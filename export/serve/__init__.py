"""A bundle as a model of an inference server."""
