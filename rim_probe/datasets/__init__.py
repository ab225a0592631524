"""Where problems come from: procedural worlds, files and the Hugging Face Hub."""
