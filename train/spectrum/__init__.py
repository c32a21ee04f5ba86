"""Compute with the Hessian: products, eigenvalues, and what is measured of them."""
