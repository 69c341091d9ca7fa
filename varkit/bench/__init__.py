"""How fast a model makes a picture, and how near that is to what the machine could do."""
