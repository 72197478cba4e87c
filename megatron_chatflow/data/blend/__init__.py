"""The datasets of the domains, and the blend of them that a run reads."""
