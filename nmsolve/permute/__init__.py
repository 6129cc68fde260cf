"""Channel permutation: orders of a layer's channels under which an N:M mask keeps more."""
