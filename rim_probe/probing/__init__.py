"""Look inside memory blocks: what they hold, where attention goes, what changes when a block is taken away."""
