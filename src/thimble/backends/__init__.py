"""Engines that run a base: each imports its own framework and nothing above it."""
