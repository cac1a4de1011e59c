"""Views: what objects show of themselves, as plain data, and its renderers to text and HTML."""
