"""What the HTML pages of this project share: style, axes, lines, pictures, and how their templates are read."""
