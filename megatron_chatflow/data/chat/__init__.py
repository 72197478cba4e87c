"""Conversations as text: templates, and which tokens of them are trained on."""
