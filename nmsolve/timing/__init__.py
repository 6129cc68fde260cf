"""How fast the mask methods and the tiles of the Triton kernels are, on this machine."""
