"""Scoring a checkpoint or a bundle on a folder of questions, with an interval and a blind floor."""
