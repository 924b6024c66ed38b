"""The embedded phone: a launcher and its apps as one self-contained page, and its initial content."""
