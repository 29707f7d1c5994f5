"""Graphs to sites; a plan to rewritten graphs."""
