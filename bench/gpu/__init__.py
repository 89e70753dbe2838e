"""What a GPU is asked, and what its kernels show without one."""
