"""The structured gradient penalty's inside: ways to its gradient, and what they share."""
