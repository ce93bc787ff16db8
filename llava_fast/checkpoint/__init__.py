"""Every checkpoint layout, in and out."""
