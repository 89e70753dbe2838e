"""A denoiser step of the engine beside its peers."""
