"""Sites: which operators read which tensor, and what can absorb a scale."""
