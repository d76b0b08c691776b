"""From recorded rows to what policies are asked."""
