"""What a device says about itself while it is measured: one module per source.

Each source answers `None` where it does not exist, is not readable, or makes no sense: a missing
sensor is told from a cold one, and never ends a measurement.
"""
