"""A denoiser step of the engine next to its peers."""
