"""Files and errors, for every room."""
