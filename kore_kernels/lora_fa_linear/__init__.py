"""A linear layer with a low-rank update whose A is frozen: y = x Wᵀ + b + s (x Aᵀ) Bᵀ."""
