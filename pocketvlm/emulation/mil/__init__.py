"""Core ML's file format and operators without Core ML: packages read and computed in numpy."""
