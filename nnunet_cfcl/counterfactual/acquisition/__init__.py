"""Analytic changes of the acquisition."""
