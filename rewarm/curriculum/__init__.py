"""Order, pacing, gates, live scores and packing: which example comes when."""
