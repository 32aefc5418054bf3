"""From text to packed rows."""
