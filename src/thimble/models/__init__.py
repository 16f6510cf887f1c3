"""What a base is: its files, description and tensor names, and what running it costs."""
