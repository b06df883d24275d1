"""The demo: trains a small CLIP on emoji with the fused loss and evaluates it."""
