"""What replays count and add up."""
