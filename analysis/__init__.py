"""Staleness profiles and loss predictions: reads runs, simulates models, never starts workers."""
