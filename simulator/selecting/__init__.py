"""What routing policies that choose experts anew have in common."""
