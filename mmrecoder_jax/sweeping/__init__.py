"""Sweeps: one training command per point of a grid, or of a random draw, of fields."""
