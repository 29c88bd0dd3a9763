"""Recipes: the one table of stages and targets, the loader, and the shipped YAML files."""
