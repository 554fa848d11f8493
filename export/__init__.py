"""The export toolchain: weights and prompts in, a verified bundle out. Nothing of it runs on the box."""
