"""Streaming covariance: the lower triangle of C += alpha * Σ w_i x_iᵀ x_i."""
