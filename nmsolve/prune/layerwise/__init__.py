"""The methods for one layer: from its weight and what its inputs were to a new weight and its mask."""
