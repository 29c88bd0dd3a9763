"""Pictures as files, and what an image processor is told of them."""
