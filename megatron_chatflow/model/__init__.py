"""The GPT: settings to megatron-core model chunks."""
