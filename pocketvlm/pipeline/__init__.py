"""The only modules that know the order of things: plan a recipe, run it, assemble the bundle."""
