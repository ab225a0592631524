"""Where problems come from: procedural worlds, files and the Hugging Face Hub; and which of them two files share."""
