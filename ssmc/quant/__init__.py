"""Quantised arithmetic, free of graphs: number formats, range observers, rotations."""
