"""From a request to pairs: text, background, noise, denoise, decode, mask."""
