"""What residency policies have in common."""
