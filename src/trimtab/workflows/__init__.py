"""What joins the other parts into one call each: capture, generate, sweep, analyze, debug_decode, demo, rerun."""
