"""The dataset factory: a job file, a store of pairs, and the workers that fill it."""
