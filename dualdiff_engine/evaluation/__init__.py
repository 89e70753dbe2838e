"""How good pairs are: measures without weights, published ones, and a downstream test."""
