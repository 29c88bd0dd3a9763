"""The only modules that know the order of the work: plan a recipe, run it, assemble the bundle."""
