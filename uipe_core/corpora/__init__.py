"""Corpora: what to forget and what to keep."""
