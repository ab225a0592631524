"""The screen: one Gradio page over `rim_probe`. No tensor maths here, and nothing of `rim_probe` imports it."""
