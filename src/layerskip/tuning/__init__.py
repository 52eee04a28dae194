"""Tuning: measured costs and acceptance to the best exit layer and draft length of this machine."""
