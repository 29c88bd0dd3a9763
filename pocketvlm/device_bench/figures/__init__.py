"""From blocks to figures: statistics, and what physics does not allow."""
