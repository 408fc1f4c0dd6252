"""What `serve.py` and `ray_serve.py` are made of: drawing, batches, routes, connections."""
