"""The embedded phone: a launcher and its apps as one self-contained page, and the contents it begins with."""
