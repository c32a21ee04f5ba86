"""The Hessian, its eigenvalues, and what is measured of them."""
