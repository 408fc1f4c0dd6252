"""`pyard demo`: the whole path in minutes, with pictures and a table."""
