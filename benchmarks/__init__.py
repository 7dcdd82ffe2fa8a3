"""What can be said about the GPU kernels: compiled for an H200 without one."""
