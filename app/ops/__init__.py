"""What operators look at: health, pool figures, metrics."""
