"""Mirror the lower triangle of a square matrix onto its upper triangle."""
