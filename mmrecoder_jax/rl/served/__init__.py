"""Rollouts that a server decodes: token ids and pictures in, token ids and how probable out."""
