"""Weight quantization, one file a method."""
