"""Causal language models as policies: loading, packing, sharding, export."""
