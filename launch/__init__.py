"""The front door: reads the world, builds the parts, starts them."""
