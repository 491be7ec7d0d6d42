"""Adapters: networks of PyTorch and JAX as problems. Imported only when they are used."""
