"""Frozen-A linear layers that read the same input and share one basis: A_i = R_i Uᵀ."""
