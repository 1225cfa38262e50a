"""Recipes: YAML files, one per stage of the paper, and their laptop counterparts (`cpu_*`)."""
