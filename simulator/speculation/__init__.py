"""TEAM's speculative decoding, walked over recorded states."""
