"""Measurements: samplers, features, distances, score rows, statistics, costs. Words and figures belong to report."""
